"""The command ``python -m fxgraft.timm``."""

from fxgraft.timm.launching import main

if __name__ == "__main__":
    main()

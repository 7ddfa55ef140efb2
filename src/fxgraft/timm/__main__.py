"""The command ``python -m fxgraft.timm``."""

from fxgraft.integrations.timm.launching import main

if __name__ == "__main__":
    main()

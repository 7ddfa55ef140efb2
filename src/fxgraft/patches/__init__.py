"""The methods: a file or a folder each, found by looking into this package."""

"""`python -m superpipeline` is the command `superpipeline`."""

from superpipeline.cli import main

if __name__ == "__main__":
    main()

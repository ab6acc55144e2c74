"""``python -m moeshard`` is the command ``moeshard``."""

from moeshard.cli import main

if __name__ == "__main__":
    main()

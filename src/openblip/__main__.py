"""`python -m openblip`, and so `torchrun … -m openblip train …`: the `openblip` command."""

from openblip.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())

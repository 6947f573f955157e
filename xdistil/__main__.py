"""`python -m xdistil` is the command line."""

from xdistil.cli import main

raise SystemExit(main())

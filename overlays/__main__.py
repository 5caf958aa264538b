from overlays.cli import main

main()

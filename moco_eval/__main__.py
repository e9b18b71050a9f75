from moco_eval.cli.main import main

main()

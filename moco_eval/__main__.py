from moco_eval.cli import main

main()

"""What lessons do for longer than a test needs: {notebook: {text that stands in one cell: what the test runs}}.
Each step is taken, on fewer pictures or in fewer epochs; stored outputs come from the lessons as they are."""

SHORTER = {
    "commands/train": {"--epochs 3 --output": "--epochs 1 --output"},
    "commands/validate": {"'--img-size', '128',": "'--img-size', '64',", "'--img-size', '128']": "'--img-size', '64']"},
    "tutorials/five_minutes": {"epochs=3": "epochs=2"},
    "tutorials/imagenet_for_real": {"('train', 40), ('val', 4)": "('train', 8), ('val', 1)"},
    "tutorials/your_own_mixer": {"(train, 800), (val, 500)": "(train, 160), (val, 250)",
                                 "4, 1, smoothing": "2, 1, smoothing"},
    "tutorials/your_own_photos": {"epochs=25": "epochs=3"},
}

"""Train the digit network with several random seeds.

    python benchmarks/accuracy_by_seed.py [SEED ...]

A seed draws the initial parameters and the order of the images. The test
accuracies after each epoch, with lagging and with settled statistics, are
added to `results/accuracy_by_seed.json`, seed by seed. One seed takes about
five minutes on two cores.
"""
import json
import re
import sys
from pathlib import Path

from d2ltvm import from_scratch as fs
from d2ltvm.mnist import load_mnist

RESULTS = Path(__file__).resolve().parent / 'results/accuracy_by_seed.json'


def main():
    digits = load_mnist()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for seed in sys.argv[1:] or ['0', '1', '2', '3', '4']:
        params, moving = fs.init_params(seed=int(seed)), fs.MovingStatistics()
        norm, test_norm = fs.training_and_testing(moving)
        runs = {'lagging': [], 'settled': []}

        def note_and_settle(params=params, moving=moving, runs=runs,
                            test_norm=test_norm):
            runs['lagging'].append(fs.accuracy(
                digits.test_images, digits.test_labels, params, test_norm))
            fs.settle(moving, digits.train_images[:10000], params)

        history = fs.train(digits, params, norm, test_norm, seed=int(seed),
                           before_test=note_and_settle)
        runs['settled'] = [testing for _, _, testing in history]
        results[seed] = runs
        text = json.dumps(dict(sorted(results.items())), indent=1)
        RESULTS.write_text(re.sub(r'\s+(?=[\d\]])', ' ', text) + '\n')


if __name__ == '__main__':
    main()

"""What any run needs: options, devices, ranks, a directory, checkpoints, metrics, logs, evaluation.

Nothing here knows an algorithm. A recipe passes plain values, tensors and callables.
"""

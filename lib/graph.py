"""A training step as one CUDA graph: its two hundred small kernels cost more to launch one by one than to run."""

import torch

EAGER_STEPS = 3  # before the capture: libraries choose algorithms and allocate, Adam makes its state


class GraphedStep:
    """`step(spectrograms, targets, n_clips)`, recorded for batches of `n_clips` clips and then replayed.

    The first full batches, and every batch of another size, run as they are. The recording depends on the learning
    rate, so a new rate makes a new one. `optimizer` needs capturable=True. The loss that is returned is overwritten
    by the next replay.
    """

    def __init__(self, step, optimizer, n_clips):
        self.step, self.optimizer, self.n_clips = step, optimizer, n_clips
        self.n_eager, self.graph, self.recorded_rate = 0, None, None
        self.stream = torch.cuda.Stream()

    def __call__(self, spectrograms, targets, n_clips):
        if len(spectrograms) != self.n_clips:
            return self.step(spectrograms, targets, n_clips)
        if self.n_eager < EAGER_STEPS:
            self.n_eager += 1
            return self._run_on_own_stream(spectrograms, targets)
        if self.recorded_rate != self.optimizer.param_groups[0]["lr"]:
            self._record(spectrograms, targets)
        self.spectrograms.copy_(spectrograms)
        self.targets.copy_(targets)
        self.graph.replay()
        return self.loss

    def _run_on_own_stream(self, spectrograms, targets):
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            loss = self.step(spectrograms, targets, self.n_clips)
        torch.cuda.current_stream().wait_stream(self.stream)
        return loss

    def _record(self, spectrograms, targets):
        """Record a step on copies of the batch. Recording computes nothing: no weight and no generator changes."""
        self.spectrograms, self.targets = spectrograms.clone(), targets.clone()
        self.optimizer.zero_grad()  # so that the recorded backward pass makes gradients of its own
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.loss = self.step(self.spectrograms, self.targets, self.n_clips)
        self.recorded_rate = self.optimizer.param_groups[0]["lr"]

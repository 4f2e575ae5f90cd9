"""A computation of gradients as a CUDA graph: a GPU runs its three hundred kernels faster than a host starts them."""

import torch

STEPS_BEFORE = 3  # run as they are before one is recorded: libraries choose algorithms and allocate memory


class Graphed:
    """`compute(net, spectrograms, targets, ...)` for training: recorded for the size of the first batch, then replayed.

    Batches of another size run as they are. A replay repeats the kernels, on the same memory, and nothing that Python
    did. What Python draws or decides in a step is for `net.draw` to write, in place, into tensors that `forward` reads.
    """

    def __init__(self, compute):
        self.compute, self.graph, self.n_steps = compute, None, 0
        self.stream = torch.cuda.Stream()

    def __call__(self, net, spectrograms, targets, *settings):
        if self.n_steps == 0:
            self.spectrograms, self.targets = spectrograms.clone(), targets.clone()
        if spectrograms.shape != self.spectrograms.shape:
            return self.compute(net, spectrograms, targets, *settings)
        self.n_steps += 1
        if self.n_steps <= STEPS_BEFORE:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                loss = self.compute(net, spectrograms, targets, *settings)
            torch.cuda.current_stream().wait_stream(self.stream)
            return loss
        if self.graph is None:  # record the computation on this object's own batch: it takes place when replayed
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.loss = self.compute(net, self.spectrograms, self.targets, *settings)
            self.gradients = [weights.grad for weights in net.parameters()]
        self.spectrograms.copy_(spectrograms)
        self.targets.copy_(targets)
        net.draw()
        self.graph.replay()
        for weights, gradient in zip(net.parameters(), self.gradients):
            weights.grad = gradient  # a batch of another size has put its own there
        return self.loss.clone()

"""The paper's three-branch convolutional network, and the original program's initial weights.

Needs nothing of this repository: copy the file to use the network elsewhere. Run as a script, prints the layers.
"""

import argparse

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

N_MELS, N_FRAMES = 128, 628  # of a spectrogram
N_FEATURES = 70 * (N_MELS // 16) * (N_FRAMES // 64)  # channels x mels x frames after the last pooling: 5,040


class MultiScaleCNN(nn.Module):
    """(clips, 1, 128, 628) normalised log-mel spectrograms -> (clips, n_tags) logits.

    The three branches see the spectrogram at full, 1/2 x 1/4 and 1/4 x 1/16 resolution (mels x frames) and meet
    at (clips, 210, 16, 19).
    """

    def __init__(self, n_tags=50):
        super().__init__()
        self.branch1 = nn.Sequential(
            ConvPool(1, 50, kernel=(3, 7), pool=(2, 4)),
            ConvPool(50, 100, kernel=(3, 5), pool=(2, 4)),
            ConvPool(100, 70, kernel=(3, 3), pool=(2, 2)),
        )
        self.branch2 = nn.Sequential(
            ConvPool(1, 100, kernel=(3, 5), pool=(2, 4)),
            ConvPool(100, 70, kernel=(3, 3), pool=(2, 2)),
        )
        self.branch3 = ConvPool(1, 70, kernel=(3, 3), pool=(2, 2))
        self.joined = nn.Sequential(
            ConvPool(210, 70, kernel=(3, 3)),
            ConvPool(70, 70, kernel=(3, 3), pool=(2, 2)),
            nn.Flatten(),
        )
        self.batch_norm = FeatureBatchNorm(N_FEATURES)
        self.dropout = BatchDropout(N_FEATURES, keep_probability=0.6)
        self.hidden = nn.Linear(N_FEATURES, 500)
        self.head = nn.Linear(500, n_tags)

    def forward(self, spectrograms):
        half = F.avg_pool2d(spectrograms, (2, 4))
        quarter = F.avg_pool2d(half, (2, 4))
        branches = self.branch1(spectrograms), self.branch2(half), self.branch3(quarter)
        features = self.joined(torch.cat(branches, dim=1))  # (clips, 5040), channel by channel
        features = self.dropout(self.batch_norm(features))
        hidden = F.relu(self.hidden(features))
        with torch.autocast(hidden.device.type, enabled=False):  # in bfloat16, many clips would share a logit
            return self.head(hidden.to(self.head.weight.dtype))

    def draw(self):
        """Draw the next training step's random numbers, in place, before a CUDA graph is replayed."""
        for layer in self.modules():
            if isinstance(layer, BatchDropout):
                layer.draw()


class ConvPool(nn.Sequential):
    """Convolution of stride 1 and zero padding k//2, max-pooling that drops incomplete windows, ReLU.

    The original applies the ReLU before the pooling. Both are monotone, so the result is the same, but after the
    pooling fewer values remain to apply it to.
    """

    def __init__(self, channels_in, channels_out, kernel, pool=None):
        padding = (kernel[0] // 2, kernel[1] // 2)
        layers = [nn.Conv2d(channels_in, channels_out, kernel, padding=padding)]
        if pool:
            layers.append(nn.MaxPool2d(pool))
        super().__init__(*layers, nn.ReLU(inplace=True))

    def forward(self, maps):
        if not maps.is_cuda:
            return super().forward(maps)
        convolution, *pooling, relu = self  # the same function, in an order that halves a GPU's time for a step
        weight, padding = convolution.weight, convolution.padding
        if pooling and convolution.in_channels == 1:
            maps = pooled_convolution_of_one_channel(maps, weight, padding, pooling[0].kernel_size)
        else:
            maps = F.conv2d(maps, weight, padding=padding)
            for layer in pooling:
                maps = layer(maps)
        return relu(maps + convolution.bias.to(maps.dtype)[:, None, None])  # after the pooling, to fewer values


def pooled_convolution_of_one_channel(maps, weight, padding, pool):
    """Return F.max_pool2d(F.conv2d(maps, weight, padding=padding), pool) for (clips, 1, mels, frames) maps.

    It is one matrix product, for which GPUs have faster kernels than for one channel's convolution. A row is what a
    pooling window sees, a column a filter at one place in the window; of each filter, the largest result counts.
    """
    (height, width), (rows, columns) = weight.shape[2:], pool
    seen = height + rows - 1, width + columns - 1
    maps = F.pad(maps, (padding[1], padding[1], padding[0], padding[0]))
    windows = maps.unfold(2, seen[0], rows).unfold(3, seen[1], columns).flatten(4).squeeze(1)
    shifted = F.pad(weight, (columns - 1, columns - 1, rows - 1, rows - 1)).unfold(2, seen[0], 1).unfold(3, seen[1], 1)
    filters = shifted.movedim((2, 3), (0, 1)).reshape(-1, seen[0] * seen[1])  # all channels' at one place, then another
    results = F.linear(windows, filters).unflatten(3, (rows * columns, -1))
    return results.max(dim=3).values.permute(0, 3, 1, 2)


class FeatureBatchNorm(nn.Module):
    """Batch normalisation of (clips, features) as Totem does it.

    Epsilon is 1e-3, and running = 0.99 running + 0.01 batch with the batch's *biased* variance, where PyTorch's
    own layer would use the unbiased one. With several processes, the statistics are the whole global batch's.
    """

    def __init__(self, n_features, epsilon=1e-3, momentum=0.01):
        super().__init__()
        self.epsilon, self.momentum = epsilon, momentum
        self.scale = nn.Parameter(torch.ones(n_features))
        self.shift = nn.Parameter(torch.zeros(n_features))
        self.register_buffer("running_mean", torch.zeros(n_features))
        self.register_buffer("running_var", torch.ones(n_features))

    def forward(self, features):
        features = features.to(self.scale.dtype)  # bfloat16 has too few digits for a mean
        mean, var = self.running_mean, self.running_var
        if self.training:
            n_clips = all_reduce(features.new_full((), len(features)))
            mean = all_reduce(features.sum(dim=0)) / n_clips
            var = all_reduce((features - mean).square().sum(dim=0)) / n_clips
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var, self.momentum)
        return (features - mean) * torch.rsqrt(var + self.epsilon) * self.scale + self.shift


class AllReduce(torch.autograd.Function):
    """The sum of a tensor over all processes; each process's loss depends on it, so its gradient is a sum too."""

    @staticmethod
    def forward(ctx, tensor):
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    backward = forward


def all_reduce(tensor):
    """Return the sum of `tensor` over all training processes, through which gradients flow back to each of them."""
    return AllReduce.apply(tensor) if dist.is_available() and dist.is_initialized() else tensor


class BatchDropout(nn.Module):
    """Totem's dropout: one mask serves every clip of the batch, and the probability is that of *keeping* a value."""

    def __init__(self, n_features, keep_probability):
        super().__init__()
        self.keep_probability = keep_probability
        self.register_buffer("mask", torch.empty(n_features), persistent=False)

    def draw_mask(self, n_features):
        """Return the mask of one step: (n_features,) float64, 0 or 1/keep_probability; on the CPU, for any device."""
        return (torch.rand(n_features) < self.keep_probability).double() / self.keep_probability

    def forward(self, features):
        if not self.training:
            return features
        if not (features.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.draw()
        return features * self.mask.clone()  # which the backward pass reads, perhaps after the next draw

    def draw(self):
        """Draw the next mask, in place. The forward pass does so, except when it is recorded as a CUDA graph."""
        mask = self.draw_mask(len(self.mask)).to(self.mask.dtype)
        mask = mask.pin_memory() if self.mask.is_cuda else mask  # from other memory, the copy would wait for the GPU
        self.mask.copy_(mask, non_blocking=True)


NETWORKS = {"MultiScaleCNN": MultiScaleCNN}  # by the names that trainer.py's --network takes, and checkpoints keep


def build_network(n_tags, name="MultiScaleCNN"):
    """Return a new network, (clips, 1, 128, 628) normalised log-mel spectrograms -> (clips, n_tags) logits.

    Every script builds it here. Its last layer must be called `head`: --start-from replaces it if the tags differ.
    With a method `draw`, as MultiScaleCNN has, it is recorded as a CUDA graph: lib/graph.py says what that requires.
    """
    return NETWORKS[name](n_tags)


@torch.no_grad()
def initialize(net, rng):
    """Draw the original's initial weights for `net` from `rng`, a numpy.random.RandomState.

    Glorot normal, layer by layer from the first branch to the head, whose weights have four times the standard
    deviation; biases are 0. Theano flips its filters and stores fully connected weights as (in, out), so each draw is
    flipped or transposed to give the same function in PyTorch. The float64 draws are rounded to the precision of `net`.
    """
    for layer in net.modules():
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            continue
        n_out, n_in, *kernel = layer.weight.shape
        deviation = np.sqrt(2 / ((n_in + n_out) * np.prod(kernel)))
        if kernel:
            weights = rng.normal(0, deviation, (n_out, n_in, *kernel))[:, :, ::-1, ::-1]
        else:
            weights = rng.normal(0, deviation, (n_in, n_out)).T
        if layer is net.head:
            weights = 4 * weights
        layer.weight.copy_(torch.from_numpy(weights.copy()))
        if layer.bias is not None:
            layer.bias.zero_()


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    net = build_network(50)
    print(net)
    print(f"{sum(weights.numel() for weights in net.parameters()):,} parameters")

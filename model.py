"""The paper's three-branch convolutional network, and the original program's initial weights.

Run as a script, prints the layers.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lib.audio import N_FRAMES, N_MELS
from lib.common import Range, run, settings_from_command_line
from lib.parallel import sum_over_processes


@dataclass(frozen=True)
class Settings:
    n_tags: Annotated[int, Range(1, 100_000)] = 50  # outputs


N_FEATURES = 70 * (N_MELS // 16) * (N_FRAMES // 64)  # channels x mels x frames after the last pooling: 5,040


def main():
    net = MultiScaleCNN(settings_from_command_line(Settings, __doc__).n_tags)
    print(net)
    print(f"{sum(weights.numel() for weights in net.parameters()):,} parameters")


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
        self.dropout = BatchDropout(keep_probability=0.6)
        self.hidden = nn.Linear(N_FEATURES, 500)
        self.top = nn.Linear(500, n_tags)

    def forward(self, spectrograms):
        half = F.avg_pool2d(spectrograms, (2, 4))
        quarter = F.avg_pool2d(half, (2, 4))
        branches = self.branch1(spectrograms), self.branch2(half), self.branch3(quarter)
        features = self.joined(torch.cat(branches, dim=1))  # (clips, 5040), channel by channel
        features = self.dropout(self.batch_norm(features))
        return self._logits(F.relu(self.hidden(features)))

    def _logits(self, hidden):
        """The last layer, never in bfloat16: in its 8 binary digits, thousands of clips share a few hundred logits."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.top(hidden.to(self.top.weight.dtype))


class ConvPool(nn.Sequential):
    """Convolution of stride 1 and zero padding k//2, max-pooling that floors, ReLU.

    The original applies the ReLU before the pooling. Both are monotone, so the order makes no difference to the
    result, but this way the ReLU has an eighth of the work.
    """

    def __init__(self, channels_in, channels_out, kernel, pool=None):
        padding = (kernel[0] // 2, kernel[1] // 2)
        layers = [nn.Conv2d(channels_in, channels_out, kernel, padding=padding)]
        if pool:
            layers.append(nn.MaxPool2d(pool))
        super().__init__(*layers, nn.ReLU(inplace=True))


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
        if self.training:
            mean, var = self._batch_statistics(features)
        else:
            mean, var = self.running_mean, self.running_var
        return (features - mean) * torch.rsqrt(var + self.epsilon) * self.scale + self.shift

    def _batch_statistics(self, features):
        n_clips = sum_over_processes(features.new_full((), len(features)))
        mean = sum_over_processes(features.sum(dim=0)) / n_clips
        var = sum_over_processes((features - mean).square().sum(dim=0)) / n_clips
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var, self.momentum)
        return mean, var


class BatchDropout(nn.Module):
    """Totem's dropout: one mask serves every clip of the batch, and the probability is that of *keeping* a value."""

    def __init__(self, keep_probability=0.6):
        super().__init__()
        self.keep_probability = keep_probability
        self.register_buffer("marker", torch.empty(0), persistent=False)  # has the network's device and precision

    def draw_mask(self, n_features):
        """Return the mask of one step: (n_features,), 0 or 1/keep_probability."""
        kept = torch.rand(n_features, device=self.marker.device) < self.keep_probability
        return kept.to(self.marker.dtype) / self.keep_probability

    def forward(self, features):
        if not self.training:
            return features
        return features * self.draw_mask(features.shape[1]).to(features)


@torch.no_grad()
def initialize(net, rng):
    """Draw the original's initial weights for `net` from `rng`, a numpy.random.RandomState.

    Glorot normal, layer by layer from the first branch to the top; the top layer's are four times as wide; biases
    are 0. Theano flips its filters and stores fully connected weights as (in, out), so each draw is turned round
    to give the same function in PyTorch. The float64 draws are rounded to the precision that `net` has.
    """
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            weights = _glorot_normal(rng, tuple(layer.weight.shape))[:, :, ::-1, ::-1]
        elif isinstance(layer, nn.Linear):
            weights = _glorot_normal(rng, tuple(layer.weight.shape)[::-1]).T
        else:
            continue
        if layer is net.top:
            weights = 4 * weights
        layer.weight.copy_(torch.from_numpy(weights.copy()))
        layer.bias.zero_()


def _glorot_normal(rng, shape):
    """Return float64 draws for a convolution (out, in, height, width) or a fully connected layer (in, out)."""
    fan_in_and_out = (shape[0] + shape[1]) * np.prod(shape[2:])
    return rng.normal(0, np.sqrt(2 / fan_in_and_out), shape)


if __name__ == "__main__":
    run(main)

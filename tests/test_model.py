"""The network against the numbers recorded from the original program."""

import hashlib
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import ROOT
from lib.common import keep_freed_memory
from model import BatchDropout, MultiScaleCNN, initialize

RECORDED = json.loads((ROOT / "tests/original.json").read_text())


def network(dtype=torch.float32):
    net = MultiScaleCNN(50).to(dtype)
    initialize(net, np.random.RandomState(1337))
    return net


def four_clips():
    return torch.from_numpy(np.random.RandomState(0).randn(4, 1, 128, 628).astype(np.float32))


def probabilities(net, clips):
    net.eval()
    with torch.no_grad():
        return torch.sigmoid(net(clips)).numpy()


def test_initial_weights_are_the_originals_bit_for_bit():
    layers = [layer for layer in network().modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    recorded = RECORDED["initial_weights"]["layers_in_draw_order"]
    assert len(layers) == len(recorded) == 10
    for layer, facts in zip(layers, recorded):
        weights = layer.weight.detach().numpy()
        original = weights[:, :, ::-1, ::-1] if weights.ndim == 4 else weights.T
        assert list(original.shape) == facts["shape"], facts["name"]
        assert hashlib.sha256(original.astype("<f4").tobytes()).hexdigest() == facts["sha256_float32"], facts["name"]
        assert not layer.bias.any()


def test_number_of_parameters():
    assert sum(weights.numel() for weights in MultiScaleCNN(50).parameters()) == 2_936_810


@pytest.mark.parametrize("dtype, tolerance, run", [(torch.float64, 1e-12, "float64"), (torch.float32, 1e-5, "float32")])
def test_forward_pass_equals_the_recorded_one(dtype, tolerance, run):
    found = probabilities(network(dtype), four_clips().to(dtype))
    assert np.abs(found - RECORDED["forward_eval"][f"probabilities_{run}_run"]).max() < tolerance


def test_five_adam_steps_equal_the_recorded_ones():
    keep_freed_memory()  # float64 is slow enough
    recorded = RECORDED["five_adam_steps_without_dropout"]
    net = network(torch.float64).train()
    net.dropout.draw_mask = torch.ones
    clips = torch.from_numpy(np.random.RandomState(0).randn(32, 1, 128, 628).astype(np.float32)).double()
    labels = torch.from_numpy(np.random.RandomState(1).randint(0, 2, (32, 50))).double()
    optimizer = torch.optim.Adam(net.parameters(), 0.001, fused=True)
    for step, expected in enumerate(recorded["losses_float64_run"], start=1):
        loss = F.binary_cross_entropy_with_logits(net(clips), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert abs(loss.item() - expected) < 1e-7, f"step {step}"
        if step in (1, 5):
            for name in ("mean", "var"):
                found = getattr(net.batch_norm, f"running_{name}")[:5].numpy()
                expected = recorded[f"running_{name}_after_step"][f"{step}_first5"]
                assert np.abs(found - expected).max() < 1e-6
    found = probabilities(net, four_clips().double())
    assert np.abs(found - recorded["probabilities_of_forward_eval_input_after_step5"]).max() < 1e-6


def test_the_networks_own_dropout_and_batch_norm_are_the_papers():
    net = MultiScaleCNN(50)
    torch.manual_seed(0)
    features = BatchDropout(100_000, keep_probability=net.dropout.keep_probability)(torch.ones(3, 100_000))
    assert torch.equal(features[0], features[1]) and torch.equal(features[0], features[2]), "one mask for the batch"
    assert abs((features[0] > 0).double().mean() - 0.6) < 0.01 and features.max() == torch.tensor(1 / 0.6)
    features = torch.cat([torch.ones(5040), 5 * torch.ones(5040)]).reshape(2, 5040)
    out = net.batch_norm(features)
    assert torch.allclose(out[1], torch.tensor(2 / np.sqrt(4 + 1e-3), dtype=torch.float32))
    assert torch.allclose(net.batch_norm.running_mean, torch.tensor(0.01 * 3))
    assert torch.allclose(net.batch_norm.running_var, torch.tensor(0.99 + 0.01 * 4)), "of the biased variance"
    assert torch.equal(net.eval().dropout(out), out)
    features = torch.ones(1, 5040, requires_grad=True)
    out = net.train().dropout(features)
    net.draw()
    out.sum().backward()
    assert torch.equal(features.grad, out), "the backward pass has the forward pass's mask"


def test_batch_norm_sees_the_convolutions_features_and_the_hidden_layer_what_dropout_leaves():
    net, seen = network().train(), {}
    layers = net.joined, net.batch_norm, net.dropout, net.hidden
    for layer in layers:
        layer.register_forward_hook(lambda layer, inputs, output: seen.update({layer: (inputs[0], output)}))
    net(four_clips()[:2])
    for before, after in zip(layers, layers[1:]):
        assert torch.equal(seen[before][1], seen[after][0]), f"{before} feeds {after}"


def test_in_bfloat16_the_last_layer_computes_in_float32():
    net, hidden = network().eval(), []
    net.hidden.register_forward_hook(lambda layer, inputs, output: hidden.append(output))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = net(four_clips())
    assert hidden[0].dtype == torch.bfloat16
    exact = F.relu(hidden[0]).double() @ net.head.weight.double().T + net.head.bias.double()
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().max() < 1e-5


def test_the_convolutions_that_a_gpu_computes_in_another_order(gpus):
    clips, found = torch.from_numpy(np.random.RandomState(0).randn(2, 1, 128, 628)), []
    for device in "cpu", "cuda":
        net = network(torch.float64).to(device, memory_format=torch.channels_last).train()
        net.dropout.draw_mask = torch.ones
        logits = net(clips.to(device))
        logits.square().sum().backward()
        found.append([logits.detach().cpu(), *(weights.grad.cpu() for weights in net.parameters())])
    for on_cpu, on_gpu in zip(*found):
        assert (on_cpu - on_gpu).abs().max() < 1e-12 * on_cpu.abs().max()
    with torch.autocast("cuda", torch.bfloat16):
        assert network().to("cuda").branch1(clips.float().to("cuda")).dtype == torch.bfloat16


def test_the_script_prints_the_network(run_script):
    assert "2,936,810" in run_script("model.py").stdout

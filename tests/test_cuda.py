"""What the scripts do on CUDA GPUs, which the CPU plays (cuda_on_cpu.py)."""

import numpy as np
import pytest
import torch

import evaluate
import trainer
from conftest import write_dump
from cuda_on_cpu import played_gpus
from lib.checkpoint import load_checkpoint
from lib.common import InputError
from lib.dump import Dump
from lib.graph import Graphed
from lib.loader import Loader, predict
from lib.parallel import choose_device, prepare_device
from model import ConvPool, MultiScaleCNN, initialize
from test_trainer import TINY, same_checkpoint, without_paths
from trainer import compute_gradients

TINY = [*TINY, "--train-size", 4]  # 2 steps


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_dump(tmp_path_factory.mktemp("small"), n_clips=8)


@pytest.fixture
def same_sums(monkeypatch):
    """Let convolutions on a GPU sum in the order of those on the CPU, for results that are equal to the last bit."""
    monkeypatch.setattr(ConvPool, "forward", torch.nn.Sequential.forward)


@pytest.mark.parametrize(
    "n_gpus, local_rank, name, expected",
    [
        (0, None, "auto", "cpu"),
        (1, None, "auto", "cuda:0"),
        (1, None, "cpu", "cpu"),
        (2, None, "cuda:1", "cuda:1"),
        (2, "1", "auto", "cuda:1"),
    ],
)
def test_the_device_that_is_chosen(n_gpus, local_rank, name, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    with played_gpus(n_gpus) as gpus:
        device = choose_device(name)
        assert str(device) == expected
        assert gpus.current == (device.index or 0), "PyTorch's own default is another"


@pytest.mark.parametrize("n_gpus, local_rank, name", [(0, None, "cuda"), (1, None, "cuda:1"), (1, "1", "auto")])
def test_a_gpu_that_is_not_there_is_one_line(n_gpus, local_rank, name, monkeypatch):
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    with played_gpus(n_gpus), pytest.raises(InputError, match="^--device cuda.*: not available .*ordinal") as error:
        choose_device(name)
    assert "\n" not in str(error.value)


def test_tf32_is_switched_on_cuda_alone(gpus):
    before = torch.backends.cuda.matmul.fp32_precision
    prepare_device(torch.device("cpu"), "float32", tf32=True)
    assert torch.backends.cuda.matmul.fp32_precision == before
    assert torch.get_float32_matmul_precision() == "highest", "PyTorch raises here once the switch was touched"
    for tf32, expected in ((True, "tf32"), (False, "ieee")):
        prepare_device(torch.device("cuda:0"), "float32", tf32)
        assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == expected


def test_training_on_a_gpu_goes_on_there_and_elsewhere(small, tmp_path, call_script, gpus, same_sums):
    def train(name, device, epochs):
        options = "--name", name, *TINY, "--device", device, "--epochs", epochs, "--resume"
        printed = call_script("trainer.py", "--data", small, "--experiments", tmp_path, *options).stdout
        return without_paths(load_checkpoint(tmp_path / name / "last.pt")), printed

    whole, printed = train("whole", "auto", 2)
    assert "machine    cuda:0, float32" in printed
    train("parts", "cuda", 1)
    parts, _ = train("parts", "cuda", 2)
    assert same_checkpoint(whole, parts)
    gpus.n_pinned = 0
    on_cpu, _ = train("parts", "cpu", 3)
    assert gpus.n_pinned == 0, "what stays on the CPU has no use for pinned memory"
    back, printed = train("parts", "cuda:0", 4)
    assert "schedule   epochs 4 to " in printed and gpus.n_pinned > 0
    assert back["history"][:3] == whole["history"] and back["history"][:4] == on_cpu["history"]
    assert not same_checkpoint(back["weights"], on_cpu["weights"])

    both = (evaluate.Settings(data=small, batch_size=4, device=device) for device in ("cpu", "cuda:0"))
    on_cpu, on_gpu = (evaluate.Evaluation(one, tmp_path / "whole/best.pt").predict(np.arange(8)) for one in both)
    assert np.array_equal(on_cpu, on_gpu)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_steps_and_predictions_are_the_cpus_and_the_host_waits_in_none(small, gpus, monkeypatch, precision, same_sums):
    dump, found, kinds = Dump(small), {}, {"cpu": compute_gradients, "cuda": compute_gradients}
    batches = [np.array(rows) for rows in ([3], [1], [5], [0], [6, 7], [2], [4])]  # one has another size
    normalization = {"mean": torch.zeros(128), "std": torch.ones(128)}
    step = trainer.training_step

    def step_without_waiting(*arguments):
        assert gpus.waits == []
        return step(*arguments)

    monkeypatch.setattr(trainer, "training_step", step_without_waiting)
    for name, compute in {**kinds, "graph": Graphed(compute_gradients)}.items():
        device = torch.device("cpu" if name == "cpu" else "cuda:0")
        net = MultiScaleCNN(3)
        initialize(net, np.random.RandomState(0))
        net.to(device, memory_format=torch.channels_last).train()
        optimizer = torch.optim.Adam(net.parameters(), fused=True)
        loader = Loader(dump, dump.labels, normalization, device, precision)
        torch.manual_seed(1)  # the masks are the same on every device
        for epoch in 1, 2:
            optimizer.param_groups[0]["lr"] = 1e-3 / epoch
            gpus.waits.clear()
            loss = trainer.train_epoch(net, optimizer, loader, batches, epoch, compute)
            assert gpus.waits == (["tolist"] if device.type == "cuda" else []), "the losses are read at the end"
            predictions = predict(net, loader, np.arange(4), batch_size=2)
            assert gpus.waits == (["tolist", "cpu"] if device.type == "cuda" else [])
        found[name] = {"loss": loss, "predictions": torch.from_numpy(predictions)}
        found[name] |= {key: weights.cpu() for key, weights in net.state_dict().items()}
    assert same_checkpoint(found["cpu"], found["cuda"]) and same_checkpoint(found["cpu"], found["graph"])
    assert gpus.n_replays == 9, "of the twelve batches of one clip, three come before the recording"


@pytest.mark.parametrize("other", [{"net": "no draw"}, {"device": "cpu"}])
def test_what_is_not_a_graph(small, tmp_path, call_script, gpus, monkeypatch, other):
    if "net" in other:
        monkeypatch.delattr(MultiScaleCNN, "draw")
    options = "--train-size 5 --validation-size 2 --batch-size 1 --epochs 1 --device".split()
    folders = "--data", small, "--experiments", tmp_path
    call_script("trainer.py", *folders, *TINY, *options, other.get("device", "cuda"))
    assert gpus.n_replays == 0


def test_a_tagger_on_a_gpu(small, tmp_path, call_script, gpus, same_sums):
    call_script("trainer.py", "--data", small, "--experiments", tmp_path, *TINY, "--epochs", 0)
    samples = np.random.RandomState(0).uniform(-1, 1, 40 * 11025)
    for precision in ("float32", "bfloat16"):
        on_cpu, on_gpu = (evaluate.Tagger(tmp_path / "paper/best.pt", device, precision) for device in ("cpu", "auto"))
        assert str(on_gpu.device) == "cuda:0"
        assert on_gpu(samples, 11025) == on_cpu(samples, 11025)


def test_a_full_gpu_is_one_line_with_the_remedy(small, tmp_path, call_script, gpus, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand more lines")

    folders = "--data", small, "--experiments", tmp_path
    call_script("trainer.py", *folders, *TINY, "--epochs", 0)
    for script, method in (("trainer.py", "train"), ("evaluate.py", "forward"), ("evaluate.py", "to")):
        options = [*TINY, "--resume"] if script == "trainer.py" else []
        with monkeypatch.context() as patch:
            patch.setattr(MultiScaleCNN, method, full)
            error = call_script(script, *folders, *options, "--device", "cuda", status=1).stderr
        assert error.startswith("error: out of GPU memory; a smaller --batch-size") and error.count("\n") == 1

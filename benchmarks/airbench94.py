"""The peer of `fast`: airbench94_muon as its papers describe it, in plain PyTorch, for any device: fp32, or bf16 by autocast.

Written from Keller Jordan 2024 (arXiv:2404.00498) and kellerjordan.github.io/posts/muon with the settings of that record: 8
epochs of batch 2000, whitened 2×2 first layer with a bias that is trained for 3 epochs, 64-256-256 channels, GELU, dirac init,
batch norm without scales (running statistics with momentum 0.6), label smoothing 0.2, shifts by 2 mirrored pixels, alternating
flip; Muon at 0.24 (momentum 0.6, three steps, renormalised kernels), Nesterov SGD with momentum 0.85 for the rest; all rates fall
linearly to 0. Nothing of cifarlab is in it but the decoded images that it is given.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CPU = torch.device("cpu")
EPOCHS, BATCH = 8, 2000
BIAS_EPOCHS = 3
SHIFT = 2
KERNEL_LR, BIAS_LR, HEAD_LR = 0.24, 0.053, 0.67  # of the loss summed over a batch
DECAY = 2e-6 * BATCH  # a step's, at the first rate
WIDTHS = (64, 256, 256)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad_(False)
        nn.init.zeros_(self.whiten.bias)  # type: ignore[arg-type]
        layers: list[nn.Module] = [nn.GELU()]
        channels = 24
        for width in WIDTHS:
            layers += [self.conv(channels, width), nn.MaxPool2d(2), self.norm(width), nn.GELU(),
                       self.conv(width, width), self.norm(width), nn.GELU()]  # fmt: skip
            channels = width
        self.layers = nn.Sequential(*layers, nn.MaxPool2d(3))
        self.head = nn.Linear(channels, 10, bias=False)
        self.head.weight.data /= self.head.weight.data.std()

    @staticmethod
    def conv(inputs: int, outputs: int) -> nn.Conv2d:
        layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        nn.init.dirac_(layer.weight.data[:inputs])
        return layer

    @staticmethod
    def norm(width: int) -> nn.BatchNorm2d:
        layer = nn.BatchNorm2d(width, eps=1e-12, momentum=0.4)
        layer.weight.requires_grad_(False)
        return layer

    def forward(self, images: Tensor, trains_bias: bool = True) -> Tensor:
        bias = self.whiten.bias
        assert bias is not None
        x = F.conv2d(images, self.whiten.weight, bias if trains_bias else bias.detach())
        x = self.layers(x).flatten(1)
        return self.head(x) / x.shape[1]  # type: ignore[no-any-return]

    @torch.no_grad()
    def set_whitening(self, images: Tensor) -> None:
        patches = F.unfold(images, 2).transpose(1, 2).reshape(-1, 12)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / torch.sqrt(values + 5e-4)).T.reshape(12, 3, 2, 2)
        self.whiten.weight.copy_(torch.cat([filters, -filters]))


def orthogonal(matrix: Tensor) -> Tensor:
    x = matrix / (matrix.norm() + 1e-7)
    if matrix.shape[0] > matrix.shape[1]:
        x = x.T
    for _ in range(3):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    result: Tensor = x.T if matrix.shape[0] > matrix.shape[1] else x
    return result


@torch.no_grad()
def muon_step(kernels: list[nn.Parameter], buffers: list[Tensor], lr: float) -> None:
    for kernel, buffer in zip(kernels, buffers, strict=True):
        assert kernel.grad is not None
        buffer.mul_(0.6).add_(kernel.grad)
        direction = kernel.grad + 0.6 * buffer
        kernel.mul_(len(kernel) ** 0.5 / kernel.norm())
        kernel.sub_(lr * orthogonal(direction.flatten(1)).view(direction.shape))


def shifted(padded: Tensor, generator: torch.Generator) -> Tensor:
    """Every image of the set at a random place within its mirrored border, by groups of equal shift."""
    side = padded.shape[-1] - 2 * SHIFT
    places = torch.randint(2 * SHIFT + 1, (len(padded), 2), generator=generator).to(padded.device)
    images = padded.new_empty(len(padded), 3, side, side).contiguous(memory_format=torch.channels_last)
    for y in range(2 * SHIFT + 1):
        for x in range(2 * SHIFT + 1):
            chosen = (places[:, 0] == y) & (places[:, 1] == x)
            images[chosen] = padded[chosen, :, y : y + side, x : x + side]
    return images


@torch.no_grad()
def views_logits(net: Net, images: Tensor) -> tuple[Tensor, Tensor]:
    """(plain logits, logits of six views of every image: mirrored and shifted by a pixel)."""
    plain, views = [], []
    net.eval()
    for batch in torch.split(images, 1000):
        own, mirrored = net(batch), net(batch.flip(-1))
        padded = F.pad(batch, (1,) * 4, "reflect")
        moved = [padded[:, :, :32, :32], padded[:, :, 2:, 2:]]
        others = torch.stack([net(view) + net(view.flip(-1)) for view in moved]).mean(0) / 2
        plain.append(own)
        views.append((own + mirrored) / 4 + others / 2)
    net.train()
    return torch.cat(plain), torch.cat(views)


def now(device: torch.device) -> tuple[float, float]:
    """Wall clock and processor seconds, with all done that the device was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


def warmed_up(device: torch.device, autocast: torch.autocast) -> Callable[[Net, Tensor, bool], Tensor]:
    """How the net is called in training: on a GPU compiled, by a net and images that are thrown away."""

    def call(net: Net, images: Tensor, trains_bias: bool) -> Tensor:
        return net(images, trains_bias)  # type: ignore[no-any-return]

    if device.type != "cuda":
        return call
    compiled: Callable[[Net, Tensor, bool], Tensor] = torch.compile(call)
    net = Net().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(BATCH, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    for trains_bias in 3 * (True, False):
        with autocast:
            logits = compiled(net, images, trains_bias)
        logits.float().sum().backward()  # type: ignore[no-untyped-call]
    return compiled


def train_port(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], seed: int, epochs: float = EPOCHS,
               precision: str = "fp32", device: torch.device = CPU) -> dict[str, Any]:  # fmt: skip
    """Accuracies and seconds of one training. train, test: images uint8 N×3×32×32, labels; precision: fp32 or bf16.

    On a GPU the net is compiled, as the record's is, before the clock starts.
    """
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    mean, std = (torch.tensor(values, device=device)[:, None, None]
                 for values in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))  # fmt: skip
    train, test = ((images.to(device), labels.to(device)) for images, labels in (train, test))
    call = warmed_up(device, autocast)
    begun = now(device)
    images = ((train[0] / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
    labels = train[1]
    net = Net().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    net.set_whitening(images[:5000])
    steps_per_epoch = len(images) // BATCH
    num_steps, bias_steps = math.ceil(epochs * steps_per_epoch), math.ceil(BIAS_EPOCHS * steps_per_epoch)

    kernels = [p for p in net.parameters() if p.ndim == 4 and p.requires_grad]
    buffers = [torch.zeros_like(kernel) for kernel in kernels]
    norm_biases = [module.bias for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    sgd = torch.optim.SGD([
        {"params": [net.whiten.bias], "lr": BIAS_LR, "weight_decay": DECAY / BIAS_LR},
        {"params": norm_biases, "lr": BIAS_LR, "weight_decay": DECAY / BIAS_LR},
        {"params": [net.head.weight], "lr": HEAD_LR, "weight_decay": DECAY / HEAD_LR},
    ], momentum=0.85, nesterov=True, fused=True)  # fmt: skip
    first = [group["lr"] for group in sgd.param_groups]

    mirrored = (torch.rand(len(images), generator=generator) < 0.5).to(device)
    images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    padded = F.pad(images, (SHIFT,) * 4, "reflect")
    step = 0
    for epoch in range(math.ceil(num_steps / steps_per_epoch)):
        images = shifted(padded, generator)
        if epoch % 2:
            images = images.flip(-1)
        for rows in torch.split(torch.randperm(len(images), generator=generator).to(device), BATCH)[:steps_per_epoch]:
            with autocast:
                logits = call(net, images[rows].contiguous(memory_format=torch.channels_last), step < bias_steps)
            F.cross_entropy(logits.float(), labels[rows], label_smoothing=0.2, reduction="sum").backward()  # type: ignore[no-untyped-call]
            left = 1 - step / num_steps
            for group, lr, share in zip(sgd.param_groups, first, (max(0.0, 1 - step / bias_steps), left, left), strict=True):
                group["lr"] = lr * share
            sgd.step()
            muon_step(kernels, buffers, KERNEL_LR * left)
            net.zero_grad(set_to_none=True)
            step += 1
            if step == num_steps:
                break
    seconds, processor_seconds = (end - start for start, end in zip(begun, now(device), strict=True))
    with autocast:
        plain, views = views_logits(net, ((test[0] / 255 - mean) / std).contiguous(memory_format=torch.channels_last))
    accuracy, tta_accuracy = (float((logits.argmax(1) == test[1]).float().mean()) for logits in (plain, views))
    return {"train_seconds": seconds, "processor_seconds": processor_seconds, "accuracy": accuracy, "tta_accuracy": tta_accuracy}

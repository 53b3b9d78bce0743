"""LPIPS against its definition in numpy, and the files it takes."""

from inspect import unwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.signal import correlate
from torch import Tensor, nn

from carn import storage
from carn.evaluation.lpips import MIN_SIDE_PX, SCALE, SHIFT, Lpips, load_lpips

SHAPES = [(64, 3, 11, 11), (192, 64, 5, 5), (384, 192, 3, 3), (256, 384, 3, 3), (256, 256, 3, 3)]
PLACES = (0, 3, 6, 8, 10)


def drawn_states(seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State dicts as the two published files hold them, of numbers that mean nothing."""
    generator = torch.Generator().manual_seed(seed)
    alexnet: dict[str, Tensor] = {"classifier.1.weight": torch.zeros(4, 4)}
    linear: dict[str, Tensor] = {}
    for number, (shape, place) in enumerate(zip(SHAPES, PLACES, strict=True)):
        fan_in = shape[1] * shape[2] * shape[3]
        kernel = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
        alexnet[f"features.{place}.weight"] = kernel
        alexnet[f"features.{place}.bias"] = torch.randn(shape[0], generator=generator) * 0.1
        weights = torch.rand(1, shape[0], 1, 1, generator=generator)
        linear[f"lin{number}.model.1.weight"] = weights
    return alexnet, linear


def drawn_lpips() -> Lpips:
    alexnet, linear = drawn_states()
    return Lpips(
        kernels=tuple(alexnet[f"features.{place}.weight"] for place in PLACES),
        biases=tuple(alexnet[f"features.{place}.bias"] for place in PLACES),
        linear=tuple(linear[f"lin{number}.model.1.weight"].flatten() for number in range(5)),
    )


def files(folder: Path, alexnet: object, linear: object) -> tuple[Path, Path]:
    paths = folder / "alexnet.pth", folder / "lin.pth"
    torch.save(alexnet, paths[0])
    torch.save(linear, paths[1])
    return paths


def batch(*images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


# ------------------------------------------------------------------------------------- definition


def pooled(x: np.ndarray) -> np.ndarray:
    height, width = ((side - 3) // 2 + 1 for side in x.shape[1:])
    views = [
        x[:, dy : dy + 2 * height - 1 : 2, dx : dx + 2 * width - 1 : 2]
        for dy in range(3)
        for dx in range(3)
    ]
    return np.max(views, axis=0)


def convolved(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray, *, stride: int, pad: int):
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    outs = [correlate(padded, one, mode="valid")[0, ::stride, ::stride] for one in kernel]
    return np.maximum(np.stack(outs) + bias[:, None, None], 0)


def numpys_features(image: np.ndarray, state: dict[str, Tensor]) -> list[np.ndarray]:
    pixels = image.transpose(2, 0, 1).astype(np.float64) / 255 * 2 - 1
    x = (pixels - np.array(SHIFT)[:, None, None]) / np.array(SCALE)[:, None, None]
    features = []
    for place in PLACES:
        kernel = state[f"features.{place}.weight"].double().numpy()
        bias = state[f"features.{place}.bias"].double().numpy()
        if place in (3, 6):
            x = pooled(x)
        stride, pad = {0: (4, 2), 3: (1, 2)}.get(place, (1, 1))
        x = convolved(x, kernel, bias, stride=stride, pad=pad)
        features.append(x)
    return features


def test_the_definition_by_numpy(tissue: np.ndarray) -> None:
    hr, sr = tissue[:37, :41], np.roll(tissue[:37, :41], 2, axis=1)
    alexnet, linear = drawn_states()
    wanted = 0.0
    pairs = zip(numpys_features(sr, alexnet), numpys_features(hr, alexnet), strict=True)
    for number, (one, other) in enumerate(pairs):
        difference = one / np.linalg.norm(one, axis=0) - other / np.linalg.norm(other, axis=0)
        weights = linear[f"lin{number}.model.1.weight"].double().numpy().reshape(-1, 1, 1)
        wanted += (weights * difference**2).sum(axis=0).mean()
    found = drawn_lpips().distance(batch(sr), batch(hr))
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(wanted, rel=1e-4)
    assert found.item() > 0.05


def test_features_are_those_of_the_layers_in_torch(tissue: np.ndarray) -> None:
    """`features` of torchvision's AlexNet, written as it is there."""
    layers = nn.Sequential(
        *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
    )
    alexnet, _ = drawn_states()
    state = {key.removeprefix("features."): value for key, value in alexnet.items()}
    layers.load_state_dict({key: state[key] for key in layers.state_dict()})
    shift, scale = (torch.tensor(values).view(1, 3, 1, 1) for values in (SHIFT, SCALE))
    x = (batch(tissue[:64, :80]).float() / 255 * 2 - 1 - shift) / scale
    found = drawn_lpips()._features(batch(tissue[:64, :80]))
    number = 0
    with torch.inference_mode():
        for layer in layers:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                torch.testing.assert_close(found[number], x, rtol=1e-4, atol=1e-5)
                number += 1
    assert number == 5


def test_equal_images_have_no_distance_and_order_does_not_matter(tissue: np.ndarray) -> None:
    lpips = drawn_lpips()
    one, other = tissue[:48, :48], tissue[100:148, 200:248]
    assert lpips.distance(batch(one), batch(one)).item() == 0
    there, back = lpips.distance(batch(one, other), batch(other, one))
    assert there == pytest.approx(back.item(), rel=1e-6)
    assert there > 0
    flat = np.zeros((48, 48, 3), np.uint8)
    assert np.isfinite(lpips.distance(batch(flat), batch(one)).item())


def test_constants_are_imagenets() -> None:
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    assert pytest.approx(2 * mean - 1, abs=1e-9) == np.array(SHIFT)
    assert pytest.approx(2 * deviation, abs=1e-9) == np.array(SCALE)


def test_images_that_have_none() -> None:
    lpips = drawn_lpips()
    least = np.zeros((MIN_SIDE_PX, MIN_SIDE_PX, 3), np.uint8)
    assert lpips.distance(batch(least), batch(least)).item() == 0
    with pytest.raises(ValueError, match=r"30 x 31 px is too small for LPIPS, .* 31 px"):
        lpips.distance(batch(least[:, :-1]), batch(least[:, :-1]))
    with pytest.raises(ValueError, match="against HR of"):
        unwrap(Lpips.distance)(lpips, batch(least), batch(least[:, :-1]))


# ------------------------------------------------------------------------------------------ files


def test_the_files_load(tmp_path: Path, tissue: np.ndarray) -> None:
    alexnet, linear = files(tmp_path, *drawn_states())
    loaded = load_lpips(alexnet=alexnet, linear=str(linear))
    sr, hr = batch(tissue[:40, :40]), batch(tissue[40:80, :40])
    assert torch.equal(loaded.distance(sr, hr), drawn_lpips().distance(sr, hr))
    assert loaded.to(torch.device("cpu")) is loaded
    moved = loaded.to(torch.device("meta"))
    tensors = (*moved.kernels, *moved.biases, *moved.linear)
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_files_on_an_object_store(tmp_path: Path, s3: Any) -> None:
    paths = files(tmp_path, *drawn_states())
    uris = [f"s3://{s3.name}/lab/{path.name}" for path in paths]
    for uri, path in zip(uris, paths, strict=True):
        storage.write_bytes(uri, path.read_bytes())
    loaded = load_lpips(alexnet=uris[0], linear=uris[1])
    assert torch.equal(loaded.linear[4], drawn_lpips().linear[4])
    with pytest.raises(ValueError, match=r"lab/none\.pth cannot be read"):
        load_lpips(alexnet=f"s3://{s3.name}/lab/none.pth", linear=uris[1])


def test_files_in_each_others_place(tmp_path: Path) -> None:
    alexnet, linear = files(tmp_path, *drawn_states())
    with pytest.raises(ValueError, match=r"lin\.pth has no features\.0\.weight"):
        load_lpips(alexnet=linear, linear=alexnet)


def test_the_weights_of_another_network(tmp_path: Path) -> None:
    alexnet, linear = drawn_states()
    alexnet["features.0.weight"] = torch.zeros(64, 3, 3, 3)
    paths = files(tmp_path, alexnet, linear)
    with pytest.raises(ValueError, match=r"alexnet\.pth: features\.0\.weight .* \(64, 3, 3, 3\)"):
        load_lpips(alexnet=paths[0], linear=paths[1])


def test_negative_weights(tmp_path: Path) -> None:
    alexnet, linear = drawn_states()
    linear["lin2.model.1.weight"][0, 5] = -0.1
    paths = files(tmp_path, alexnet, linear)
    with pytest.raises(ValueError, match=r"lin\.pth: lin2\.model\.1\.weight has negative"):
        load_lpips(alexnet=paths[0], linear=paths[1])


class Executed:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("content", [Executed(), [1, 2], b"<html>not found</html>", b"", None])
def test_files_that_hold_something_else(
    content: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    alexnet, linear = files(tmp_path, *drawn_states())
    if isinstance(content, bytes):
        alexnet.write_bytes(content)
    elif content is None:
        alexnet.unlink()
    else:
        torch.save(content, alexnet)
    with pytest.raises(ValueError, match=r"alexnet\.pth"):
        load_lpips(alexnet=alexnet, linear=linear)
    assert not (tmp_path / "executed").exists()

"""Stride and padding: the formula against running, what is lost at the borders against counting windows one by one."""

import numpy as np
import pytest
import torch
from torch import nn

from cifarlab.analysis.geometry import build_mini_network, measure_geometry, output_size, respond
from cifarlab.config import InputError


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("size", [(32, 32), (9, 14)])
def test_sizes_by_formula_are_those_that_run(kernel: int, size: tuple[int, int]) -> None:
    found = measure_geometry(size, kernel=kernel, depth=1 if min(size) < 32 else 2)
    assert [(g.stride, g.padding) for g in found] == [(s, p) for s in (1, 2, 3) for p in (0, 1, 2)]
    for geometry in found:
        assert geometry.formula == geometry.sizes


def test_the_formula_is_the_textbooks() -> None:
    assert output_size(32, 3, 1, 1) == 32
    assert output_size(32, 3, 2, 0) == 15
    assert output_size(7, 3, 2, 0) == 3
    assert output_size(32, 3, 1, 0, dilation=2) == 28
    assert all(output_size(n, k, s, p) == nn.Conv1d(1, 1, k, s, p)(torch.zeros(1, 1, n)).shape[2]
               for n in range(5, 12) for k in (1, 2, 3, 5) for s in (1, 2, 3, 4) for p in (0, 1, 2))  # fmt: skip
    with pytest.raises(InputError, match="no window of 5 fits on 4 pixels"):
        output_size(4, 5, 1, 0)


def windows(size: int, kernel: int, stride: int, padding: int) -> list[list[int]]:
    return [[start + k - padding for k in range(kernel)]
            for start in range(0, size + 2 * padding - kernel + 1, stride)]  # fmt: skip


def test_what_windows_read_is_counted_one_by_one() -> None:
    size, kernel = (11, 8), 3
    for geometry in measure_geometry(size, kernel=kernel, depth=1):
        counts, on_padding, total = np.zeros(size, int), 0, 0
        for rows in windows(size[0], kernel, geometry.stride, geometry.padding):
            for columns in windows(size[1], kernel, geometry.stride, geometry.padding):
                for y in rows:
                    for x in columns:
                        total += 1
                        if 0 <= y < size[0] and 0 <= x < size[1]:
                            counts[y, x] += 1
                        else:
                            on_padding += 1
        np.testing.assert_array_equal(geometry.counts, counts)
        np.testing.assert_array_equal(geometry.paths, counts)  # of one layer
        assert geometry.padded_share == pytest.approx(on_padding / total)
        assert geometry.unread_share == (counts == 0).mean()


def test_known_losses_at_the_borders() -> None:
    found = {(g.stride, g.padding): g for g in measure_geometry((32, 32))}
    # 3×3, stride 2, no padding: windows at 0, 2, … 28 + … end at pixel 30, so the last row and column are never read
    assert found[2, 0].unread_share == pytest.approx(63 / 1024)
    assert found[1, 0].unread_share == found[1, 1].unread_share == 0
    assert found[1, 0].counts[0, 0] == 1
    assert found[1, 0].counts[16, 16] == 9
    assert found[1, 1].counts[0, 0] == 4
    assert (found[1, 2].paths == 81).all()  # "full" padding: every pixel counts as much as any other
    assert found[1, 0].weak_share == pytest.approx(1 - 24**2 / 1024)  # of two layers, four pixels on each side count less
    assert found[1, 1].weak_share == pytest.approx(1 - 28**2 / 1024)  # and two
    assert found[1, 2].weak_share == 0
    assert found[1, 0].padded_share == 0
    assert [found[s, 1].field for s in (1, 2, 3)] == [5, 7, 9]  # 1 + 2 + 2·stride
    assert [found[s, 1].jump for s in (1, 2, 3)] == [1, 4, 9]
    assert found[3, 0].sizes == ((10, 10), (3, 3))
    assert found[3, 0].lost_share > found[3, 0].unread_share > 0  # what one layer reads the next may drop
    # 8 channels: 27 and 72 multiply-adds an output channel and position
    assert found[1, 1].macs == 1024 * 8 * 27 + 1024 * 8 * 72


def test_paths_are_counted_as_the_windows_of_windows() -> None:
    (geometry,) = measure_geometry((10, 10), strides=[2], paddings=[1], depth=2)
    first, second = windows(10, 3, 2, 1), windows(5, 3, 2, 1)
    line = np.zeros(10, int)
    for outer in second:
        for middle in outer:
            if 0 <= middle < 5:
                for pixel in first[middle]:
                    if 0 <= pixel < 10:
                        line[pixel] += 1
    np.testing.assert_array_equal(geometry.paths, np.outer(line, line))


def test_only_stride_and_padding_differ_between_mini_networks() -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    one, other = build_mini_network(3, 1, 1), build_mini_network(3, 2, 0)
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    image = torch.rand(3, 12, 12)
    first, _ = respond(one, image)
    strided, _ = respond(other, image)
    np.testing.assert_allclose(strided[:, :4, :4], first[:, 1:8:2, 1:8:2], atol=1e-6)  # the same windows, every second one
    given = build_mini_network(3, 1, 1, filters=torch.ones(5, 3, 3, 3))
    np.testing.assert_allclose(respond(given, image)[0][0, 5, 5], float(image[:, 4:7, 4:7].sum()), rtol=1e-5)

"""The symmetry algebra against brute force: numpy flips and quarter turns of arrays that hold their own indices."""

import doctest
import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

import tritonsym.symmetry
from tritonsym import FilterLayout, Symmetry
from tritonsym.nn import SymmetricConv2d, SymmetricConv3d
from tritonsym.symmetry import Element, parity_axes, tap_orbits

AXIS = {"h": -1, "v": -2, "z": -3}
# every group, in the order of a layer's base filters, and its elements in the order of a layer's images
ELEMENTS = {
    "h": ["id", "h"],
    "v": ["id", "v"],
    "z": ["id", "z"],
    "hv": ["id", "h", "v", "hv"],
    "hz": ["id", "h", "z", "hz"],
    "vz": ["id", "v", "z", "vz"],
    "hvz": ["id", "h", "v", "z", "vz", "hz", "hv", "hvz"],
    "c2": ["id", "r180"],
    "c4": ["id", "r90", "r180", "r270"],
    "d4": ["id", "r90", "r180", "r270", "h", "h r90", "h r180", "h r270"],
}
FLIPS = [name for name in ELEMENTS if set(name) <= set(AXIS)]
KERNELS = [
    *[(1,), (2,), (3,), (4,), (5,)],
    *[(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (1, 3), (4, 1), (2, 3), (3, 2), (5, 4), (3, 5)],
    *[(1, 1, 1), (2, 2, 2), (3, 3, 3), (1, 2, 3), (3, 1, 2), (2, 3, 1), (4, 3, 2)],
]


def acts(name, kernel):
    if name in ("c2", "c4", "d4"):
        return len(kernel) == 2 and (name == "c2" or kernel[0] == kernel[1])
    return all(-AXIS[letter] <= len(kernel) for letter in name)


CASES = [(name, kernel) for name in ELEMENTS for kernel in KERNELS if acts(name, kernel)]


def image(array, element):
    """The element's factors, read right to left, applied to the last axes of an array."""
    for factor in reversed(element.split()):
        if factor.startswith("r"):
            array = np.rot90(array, int(factor[1:]) // 90, (-2, -1))
        elif factor != "id":
            array = np.flip(array, [AXIS[letter] for letter in factor])
    return array


def indices(kernel):
    return np.arange(math.prod(kernel)).reshape(kernel)


def first_seen(keys):
    """Number equal keys alike, in the order of their first appearance."""
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return tuple(number[key] for key in keys)


# --- groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ELEMENTS)
def test_elements_come_in_the_documented_order(name):
    symmetry = Symmetry(name)
    assert [str(g) for g in symmetry.elements] == ELEMENTS[name]
    assert [Element.parse(str(g)) for g in symmetry.elements[1:]] == list(symmetry.elements[1:])
    assert symmetry.order == len(ELEMENTS[name])


@pytest.mark.parametrize(("name", "kernel"), CASES)
def test_slots_are_those_of_numpy(name, kernel):
    Symmetry(name).check_kernel(kernel, "test")
    for g in Symmetry(name).elements:
        assert list(g.slots(kernel)) == image(indices(kernel), str(g)).ravel().tolist(), g


def test_h_r90_turns_first():
    assert Element.parse("h r90").slots((2, 2)) == (3, 1, 2, 0)  # [[0, 1], [2, 3]] -> [[1, 3], [0, 2]] -> mirrored
    assert Element.parse("r90").slots((2, 2)) == (1, 3, 0, 2)


@pytest.mark.parametrize(("name", "kernel"), [case for case in CASES if min(case[1]) > 1])
def test_elements_are_a_group(name, kernel):
    group = {g.slots(kernel) for g in Symmetry(name).elements}
    identity = tuple(range(math.prod(kernel)))
    assert len(group) == len(ELEMENTS[name])
    assert identity in group
    for a in group:
        assert {tuple(a[k] for k in b) for b in group} == group  # closed; the b that gives the identity is a's inverse


@pytest.mark.parametrize(
    ("name", "kernel"), [(n, k) for n in ELEMENTS for k in [(3,), (3, 3), (3, 5), (3, 3, 3)] if not acts(n, k)]
)
def test_a_kernel_the_group_cannot_act_on_is_refused(name, kernel):
    with pytest.raises(ValueError, match=f"^here: symmetry '{name}'"):
        Symmetry(name).check_kernel(kernel, "here")


@pytest.mark.parametrize(("name", "kernel"), [case for case in CASES if case[0] in FLIPS])
def test_idle_axes_are_those_whose_flip_changes_nothing(name, kernel):
    idle = [letter for letter in name if np.array_equal(image(indices(kernel), letter), indices(kernel))]
    assert list(Symmetry(name).idle_axes(kernel)) == idle


def test_names_are_values():
    assert Symmetry("zvh") == Symmetry("hvz") and hash(Symmetry("vh")) == hash(Symmetry("hv"))
    assert str(Symmetry("vh")) == "hv" and repr(Symmetry("radial:0.5")) == "Symmetry('radial:0.5')"
    for name in ("", "x", "hh", "hx", "c3", "D4", "radial:", "radial:0", "radial:-1", "radial:1/0", "radial:x"):
        with pytest.raises(ValueError, match=r"^Symmetry: "):
            Symmetry(name)


# --- ties -------------------------------------------------------------------------------------------------------------


def odd_axes(name):
    """Every choice of odd axes that a symmetry knows."""
    if name in FLIPS:
        return ["".join(letters) for count in range(len(name) + 1) for letters in combinations(name, count)]
    return ["", "h"] if name == "d4" else [""]


def projector(name, kernel, odd):
    """mean_g chi(g) g as a matrix on the taps: what signed averaging makes of every filter with a single 1."""
    count = math.prod(kernel)
    units = np.eye(count).reshape(count, *kernel)
    signs = [(-1) ** sum(element.count(letter) for letter in odd) for element in ELEMENTS[name]]
    images = [sign * image(units, element) for sign, element in zip(signs, ELEMENTS[name], strict=True)]
    return np.mean(images, 0).reshape(count, count)


@pytest.mark.parametrize(("name", "kernel"), CASES)
def test_tap_orbits_are_what_signed_averaging_leaves(name, kernel):
    for odd in odd_axes(name):
        average = projector(name, kernel, odd)
        if not average.any():
            with pytest.raises(ValueError, match=r"forces every tap .* to zero"):
                tap_orbits(Symmetry(name), kernel, odd)
            continue
        orbits = tap_orbits(Symmetry(name), kernel, odd)
        expand = np.zeros((math.prod(kernel), len(orbits)))
        for tap, (slot, sign) in enumerate(zip(orbits.slot, orbits.sign, strict=True)):
            if slot >= 0:
                expand[tap, slot] = sign
            assert (slot < 0) == (sign == 0) == (average[tap, tap] == 0), "forced zeros"
        np.testing.assert_array_equal(expand / orbits.multiplicity @ expand.T, average)
        stored = [slot for slot in orbits.slot if slot >= 0]
        assert first_seen(stored) == tuple(stored), "orbits are numbered by their first tap"
        assert all(orbits.sign[orbits.slot.index(slot)] == 1 for slot in stored), "first taps have sign 1"
        assert sum(orbits.multiplicity) == len(stored) == np.count_nonzero(average.diagonal())


@pytest.mark.parametrize(
    ("name", "kernel", "odd", "slot", "sign"),
    [
        ("h", (3,), "", (0, 1, 0), (1, 1, 1)),
        ("h", (3,), "h", (0, -1, 0), (1, 0, -1)),
        ("h", (4,), "h", (0, 1, 1, 0), (1, 1, -1, -1)),
        ("hv", (3, 3), "h", (0, -1, 0, 1, -1, 1, 0, -1, 0), (1, 0, -1) * 3),
        ("d4", (3, 3), "", (0, 1, 0, 1, 2, 1, 0, 1, 0), (1,) * 9),
        ("radial", (3, 3), "", (0, 1, 0, 1, 2, 1, 0, 1, 0), (1,) * 9),
    ],
)
def test_tap_orbits_written_out(name, kernel, odd, slot, sign):
    orbits = tap_orbits(Symmetry(name), kernel, odd)
    assert (orbits.slot, orbits.sign) == (slot, sign)


@pytest.mark.parametrize(("name", "kernel"), [("d4", (3, 3)), ("h", (1,)), ("hv", (4, 1)), ("radial", (3, 3))])
def test_odd_parity_that_leaves_no_tap_is_refused(name, kernel):
    symmetry = Symmetry(name)
    with pytest.raises(ValueError, match=r"every tap .*to zero; use .*parity='even'"):
        tap_orbits(symmetry, kernel, parity_axes(symmetry, "odd"))


@pytest.mark.parametrize("width", [None, "0.1", "0.3", "0.5", "1", "1.5", "2.5", "9"])
@pytest.mark.parametrize("kernel", [*KERNELS, (7, 7), (9, 6)])
def test_radial_ties_taps_by_their_distance(kernel, width):
    rings = []
    for tap in np.ndindex(*kernel):
        squared = sum((Fraction(size - 1, 2) - k) ** 2 for k, size in zip(tap, kernel, strict=True))
        ring = squared
        if width is not None:
            ring = next(m for m in range(1000) if ((m + 1) * Fraction(width)) ** 2 > squared)
        rings.append(ring)
    orbits = tap_orbits(Symmetry("radial" if width is None else f"radial:{width}"), kernel)
    assert orbits.slot == first_seen(rings)
    assert set(orbits.sign) == {1}


@pytest.mark.parametrize(
    ("name", "parity", "odd"),
    [
        *[(name, "even", "") for name in [*ELEMENTS, "radial"]],
        *[(name, "odd", name) for name in FLIPS],
        ("c2", "odd", ""),
        ("c4", "odd", ""),
        ("d4", "odd", "h"),
        ("hv", {"h": "odd", "v": "even"}, "h"),
        ("hvz", {"z": "odd", "h": "odd"}, "hz"),
        ("v", {}, ""),
    ],
)
def test_parity_names_the_odd_axes(name, parity, odd):
    assert parity_axes(Symmetry(name), parity) == odd


@pytest.mark.parametrize("parity", ["Odd", {"z": "odd"}, {"h": "o"}, {"hv": "odd"}, {"": "odd"}])
def test_unknown_parity_is_refused(parity):
    with pytest.raises(ValueError, match=r"^parity: parity"):
        parity_axes(Symmetry("hv"), parity)


# --- layouts ----------------------------------------------------------------------------------------------------------


def written_out(bases, free):
    """(stored filter, element) of every output filter, from the number of base filters of every symmetry."""
    base_filters = [(name, n) for name in ELEMENTS for n in range(bases.get(name, 0))]
    stored = [(u, "id") for u in range(len(base_filters) + free)]
    images = [
        (base_filters.index((name, n)), element)
        for name in ELEMENTS
        for element in ELEMENTS[name][1:]
        for n in range(bases.get(name, 0))
    ]
    return stored + images


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(
    ("bases", "free"),
    [
        ({"h": 1}, 0),
        ({"v": 2}, 1),
        ({"hv": 2, "h": 1, "v": 3}, 2),
        ({"hvz": 2, "z": 1, "vz": 2, "hz": 1, "hv": 1}, 0),
        ({"d4": 2, "c4": 1, "c2": 1, "hv": 1, "h": 2}, 3),
        ({}, 4),
        (dict.fromkeys(reversed(ELEMENTS), 1), 1),
    ],
)
def test_output_order(bases, free, groups):
    counts = {name: n * len(ELEMENTS[name]) * groups for name, n in bases.items()}
    layout = FilterLayout.parse(counts, sum(counts.values()) + free * groups, groups)
    assert [(u, str(g)) for u, g in layout.filters] == written_out(bases, free)
    assert layout.stored_per_group == sum(bases.values()) + free
    assert layout.stored_channels == layout.stored_per_group * groups
    assert layout.out_channels == len(layout.filters) * groups
    assert {symmetry.name: count for symmetry, count in layout.counts.items()} == counts
    assert FilterLayout.parse(str(layout), layout.out_channels, groups) == layout
    assert FilterLayout.from_stored(counts, layout.stored_channels, groups) == layout
    assert FilterLayout.from_stored(layout, layout.stored_channels, groups) is layout


def test_output_order_of_one_layer_in_full():
    layout = FilterLayout.parse({"hv": 8, "h": 2}, 11)
    assert [f"{u} {g}" for u, g in layout.filters] == [
        *["0 id", "1 id", "2 id", "3 id"],  # one base filter of h, two of hv, a free one
        *["0 h", "1 h", "2 h", "1 v", "2 v", "1 hv", "2 hv"],
    ]
    assert str(layout) == "h:2 hv:8 free:1"


@pytest.mark.parametrize(
    ("spec", "out", "groups", "text"),
    [
        ("hv", 8, 1, "hv:8"),
        ("vh", 16, 2, "hv:16"),
        (None, 5, 1, "free:5"),
        ({}, 6, 3, "free:6"),
        ({"h": 0, "v": 2}, 3, 1, "v:2 free:1"),
        ({"h": "50%"}, 8, 1, "h:4 free:4"),
        ({"h": "50%"}, 10, 1, "h:4 free:6"),
        ({"h": "50%"}, 7, 1, "h:4 free:3"),
        ({"h": "33.3%"}, 16, 1, "h:4 free:12"),
        ({"h": " 37.5 %"}, 16, 1, "h:6 free:10"),
        ({"hv": "99%"}, 16, 1, "hv:16"),
        ({"hv": "96%"}, 16, 1, "hv:12 free:4"),
        ({"h": "0%", "v": "100%"}, 4, 1, "v:4"),
        ({"h": "50%"}, 16, 4, "h:8 free:8"),
        ({"h": "50%"}, 12, 4, "free:12"),
        ({"d4": "50%", "h": 4, "c4": "25%"}, 32, 1, "h:4 c4:8 d4:16 free:4"),
        ("d4:50% h:4 c4:25%", 32, 1, "h:4 c4:8 d4:16 free:4"),
        ("h:50%, hv:8,free:8", 32, 2, "h:16 hv:8 free:8"),
    ],
)
def test_layout_from_names_counts_and_percents(spec, out, groups, text):
    layout = FilterLayout.parse(spec, out, groups)
    assert str(layout) == text
    assert layout.out_channels == out


@pytest.mark.parametrize(
    ("spec", "out", "groups", "message"),
    [
        ({"h": 3}, 8, 1, "h=3 .* nearest valid counts: 2 or 4"),
        ({"hv": 6}, 16, 2, "hv=6 .* in each of 2 groups; nearest valid counts: 0 or 8"),
        ({"h": -2}, 8, 1, "h=-2 .* nearest valid counts: 0 or 2"),
        ("d4", 12, 1, "d4=12 .* nearest valid counts: 8 or 16"),
        ({"h": 4, "v": 6}, 8, 1, r"4 \(h\) \+ 6 \(v\) = 10 filters, but out_channels is 8"),
        ({"hv": 4, "vh": 4}, 8, 1, "'hv' is given twice, the second time as 'vh'"),
        ({"q": 4}, 8, 1, "unknown symmetry 'q'"),
        ({"h": "half"}, 8, 1, "h='half' is not a percentage"),
        ({"h": "101%"}, 8, 1, "h='101%' is not a percentage"),
        ("radial", 8, 1, "TiedConv"),
        ("h", 8, 3, "out_channels=8 must be a multiple of groups=3"),
        ("h:4 h:2", 8, 1, "names and counts such as 'h:50% hv:8', each name once, got 'h:4 h:2'"),
        ("h: 4", 8, 1, "names and counts such as"),
        ("h:4 free:3", 8, 1, "free:3 is asked for, but the symmetries leave 4 of 8 filters"),
        ("h:4 free:50%", 8, 1, "free:50% must be a count of filters"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(spec, out, groups, message):
    with pytest.raises(ValueError, match=f"^layer: .*{message}"):
        FilterLayout.parse(spec, out, groups, "layer")


def test_from_stored_needs_to_know_the_output():
    assert FilterLayout.from_stored("hv", 3) == FilterLayout.parse("hv", 12)
    assert FilterLayout.from_stored({"h": 4}, 5) == FilterLayout.parse({"h": 4}, 7)
    assert FilterLayout.from_stored("h:4 free:3", 5) == FilterLayout.parse({"h": 4}, 7)
    assert FilterLayout.from_stored(None, 5) == FilterLayout.parse(None, 5)
    for spec in ({"h": "50%"}, {"h": 12}, FilterLayout.parse("h", 4)):
        with pytest.raises(ValueError, match=r"^FilterLayout: "):
            FilterLayout.from_stored(spec, 5)


def test_layers_store_one_filter_per_orbit():
    conv = SymmetricConv2d(1, 16, 3, symmetry={"h": 2, "v": 4, "hv": 8})
    assert conv.weight.shape == (7, 1, 3, 3)  # 1 + 2 + 2 base filters and 2 free ones
    assert [len(bases) for _, bases in conv.layout.bases] == [1, 2, 2] and conv.layout.free == 2
    deep = SymmetricConv3d(1, 10, 3, symmetry={"h": 2, "v": 2, "z": 2, "hz": 4})
    assert deep.weight.shape == (4, 1, 3, 3, 3)
    assert str(deep.layout) == "h:2 v:2 z:2 hz:4"


def test_docstring_examples():
    result = doctest.testmod(tritonsym.symmetry)
    assert result.attempted >= 2
    assert result.failed == 0

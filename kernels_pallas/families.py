"""Which sequences of a step share cached pages, and the arrays that tell the kernels so. Host work only, numpy.

A page belongs to one prefix, so two sequences whose tables have the same page in a column have the same pages before
it. Counting how many sequences of the step name each page therefore shows the whole tree of shared prefixes: along a
row the count only falls, and every stretch of equal counts above one is a node of that tree, a *run* of pages with
the same members.

A tree can be as deep as there are sequences, each longer by a page than the one before. Beyond `MAX_DEPTH` the runs
that differ little from one below are left out first, which bounds the depth by the logarithm of the sequences.

A cost rule chooses which runs become families. A run that does not pay is read by the families below it, or by the
sequences themselves: what a sequence reads is always consecutive, family after family, then its own keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from kernels_pallas.family_costs import COSTS, FamilyCosts
from kernels_pallas.geometry import Geometry

MAX_LEVELS = 2
MAX_DEPTH = 16  # of a tree whose runs are all considered
_NEARLY_ALL = 7 / 8  # of what a run's readers pay
HostOrDeviceArray = Any  # numpy where the host fills it in, jax.Array in the compiled step


class SharedPrefixes(NamedTuple):
    """The families of a step, int32, of static size. F families at most, L levels, N = T * L gathered queries; T: the
    step's tokens, or as many at its beginning as can be in a family.

    tokens     [N]      the family pass's queries: tokens of the step, family after family
    cu_q_lens  [F + 1]  family f owns queries cu_q_lens[f] : cu_q_lens[f + 1]
    table_rows [F]      row of the step's page table (any member's) with the family's pages
    kv_starts  [F]      its first key and the key after its last, both multiples of the page size
    kv_lens    [F]
    num_families [1]    how many there are; 0: none
    own_starts [S]      where each sequence's own keys begin; 0 without a family
    rows       [T, L]   where in `tokens` each token is, level by level; N where it is not
    """

    tokens: HostOrDeviceArray
    cu_q_lens: HostOrDeviceArray
    table_rows: HostOrDeviceArray
    kv_starts: HostOrDeviceArray
    kv_lens: HostOrDeviceArray
    num_families: HostOrDeviceArray
    own_starts: HostOrDeviceArray
    rows: HostOrDeviceArray

    @classmethod
    def empty(cls, *, num_tokens: int, num_seqs: int, levels: int = MAX_LEVELS) -> SharedPrefixes:
        """No family, for a step of `num_seqs`; only the first `num_tokens` of its tokens can be in one."""
        num_rows = num_tokens * levels
        num_families = max(1, min(num_seqs, num_tokens) // 2 * levels)  # each has two members or more

        def zeros(*shape: int) -> np.ndarray:
            return np.zeros(shape, np.int32)

        return cls(
            tokens=zeros(num_rows),
            cu_q_lens=zeros(num_families + 1),
            table_rows=zeros(num_families),
            kv_starts=zeros(num_families),
            kv_lens=zeros(num_families),
            num_families=zeros(1),
            own_starts=zeros(num_seqs),
            rows=np.full((num_tokens, levels), num_rows, np.int32),
        )

    def geometry(self, step: Geometry) -> Geometry:
        """Of the family pass, given the step's own."""
        return replace(
            step,
            num_tokens=self.tokens.shape[0],
            num_seqs=self.table_rows.shape[0],
            num_decode_slots=0,
            causal=False,
        )


@dataclass(kw_only=True)
class _Run:
    """A node of the tree of shared prefixes. start, stop: its columns of the page table; members: rows of it.

    plain_cost: what a key of the run costs when every member reads it for itself.
    """

    start: int
    stop: int
    members: np.ndarray
    num_tokens: int
    plain_cost: float
    children: list[_Run] = field(default_factory=list)


class _Family(NamedTuple):
    run: _Run
    start: int  # column; before run.start where it reads the runs above it too
    level: int


class _Choice(NamedTuple):
    """saved: cost units saved by these families."""

    saved: float
    families: tuple[_Family, ...]


_NOTHING = _Choice(0.0, ())


@dataclass(frozen=True, kw_only=True)
class FamilyPlanner:
    """Finds a step's families.

    levels: how many families a sequence may be in; L of the arrays. costs: of the backend that will run them,
    `family_costs.COSTS`.
    """

    page_size: int
    levels: int = MAX_LEVELS
    costs: FamilyCosts = COSTS["jnp"]

    def __post_init__(self) -> None:
        if self.page_size < 1 or self.levels < 1:
            raise ValueError(f"families: expected page_size and levels of at least 1, got {self}")

    def empty(self, *, num_decode_slots: int, num_tokens: int, num_seqs: int) -> SharedPrefixes:
        """A step's arrays without a family: what `plan` returns in shape."""
        covered = num_tokens if self.costs.of_prompts else max(1, num_decode_slots)
        return SharedPrefixes.empty(num_tokens=covered, num_seqs=num_seqs, levels=self.levels)

    def plan(
        self,
        page_table: np.ndarray,
        cu_q_lens: np.ndarray,
        kv_lens: np.ndarray,
        *,
        num_decode_slots: int,
        num_tokens: int,
    ) -> SharedPrefixes:
        """The step's own arrays, see `kernels_pallas.paged_attention`; rows without a sequence have kv_lens 0.

        num_tokens: of the step, padded. Pages that hold keys of a sequence's own queries are never shared.
        """
        shared = self.empty(num_decode_slots=num_decode_slots, num_tokens=num_tokens, num_seqs=len(kv_lens))
        q_lens = np.diff(cu_q_lens)
        num_pages = np.maximum(kv_lens - q_lens, 0) // self.page_size
        if not self.costs.of_prompts:
            num_pages[num_decode_slots:] = 0
        roots = _tree(page_table, num_pages, q_lens, self.costs.plain(q_lens, num_decode_slots))
        known: dict[tuple[int, int, int], _Choice] = {}
        choices = [self._best(root, 0, self.levels, known) for root in _thinned(roots)]
        if sum(choice.saved for choice in choices) > self.costs.step:
            _fill(shared, [f for choice in choices for f in choice.families], cu_q_lens, self.page_size)
        return shared

    def _best(self, run: _Run, start: int, levels: int, known: dict[tuple[int, int, int], _Choice]) -> _Choice:
        """The families that save most in the tree under `run`, whose members have nothing yet from column `start`.

        As deep a recursion as the tree, see `_thinned`. known: earlier answers, by the arguments.
        """
        if not levels:
            return _NOTHING
        asked = id(run), start, levels
        if asked not in known:
            known[asked] = self._choose(run, start, levels, known)
        return known[asked]

    def _choose(self, run: _Run, start: int, levels: int, known: dict[tuple[int, int, int], _Choice]) -> _Choice:
        saved = self.costs.saved(run.plain_cost, run.num_tokens, (run.stop - start) * self.page_size)
        if not run.children:
            return _Choice(saved, (_Family(run, start, self.levels - levels),)) if saved > 0 else _NOTHING
        without = _all(self._best(child, start, levels, known) for child in run.children)
        below = _all(self._best(child, run.stop, levels - 1, known) for child in run.children)
        if saved + below.saved <= max(without.saved, 0):
            return without
        family = _Family(run, start, self.levels - levels)
        return _Choice(saved + below.saved, (family, *below.families))


def _all(choices: Iterable[_Choice]) -> _Choice:
    saved, families = 0.0, list[_Family]()
    for choice in choices:
        saved += choice.saved
        families += choice.families
    return _Choice(saved, tuple(families))


def _tree(page_table: np.ndarray, num_pages: np.ndarray, q_lens: np.ndarray, plain_costs: np.ndarray) -> list[_Run]:
    """The runs that more than one sequence reads: those that begin in column 0, the others as their children.

    num_pages [S]: pages whose keys all of a sequence's queries see.
    """
    first_pages = page_table[num_pages > 0, 0].tolist()
    if len(set(first_pages)) == len(first_pages):
        return []
    counts = _num_readers(page_table[:, : num_pages.max()], num_pages)
    # An entry of the table is a run's end, as one of its members sees it, when the next one has fewer readers.
    ends = np.flatnonzero((counts[:, :-1] != counts[:, 1:]) & (counts[:, :-1] > 1))
    seqs, columns = np.divmod(ends, counts.shape[1] - 1)
    _, representative, run_of = np.unique(page_table[seqs, columns], return_index=True, return_inverse=True)
    has_parent = np.append(False, seqs[1:] == seqs[:-1])  # the row's end before this one
    starts = np.where(has_parent, np.append(0, columns[:-1] + 1), 0)
    members = np.split(seqs[np.argsort(run_of, kind="stable")], np.cumsum(np.bincount(run_of))[:-1])
    num_tokens = np.bincount(run_of, weights=q_lens[seqs]).astype(int).tolist()
    costs = np.bincount(run_of, weights=plain_costs[seqs]).tolist()
    runs = [
        _Run(start=start, stop=column + 1, members=members[r], num_tokens=num_tokens[r], plain_cost=costs[r])
        for r, (start, column) in enumerate(
            zip(starts[representative].tolist(), columns[representative].tolist(), strict=True)
        )
    ]
    roots: list[_Run] = []
    for run, end in zip(runs, representative.tolist(), strict=True):
        (runs[run_of[end - 1]].children if has_parent[end] else roots).append(run)
    return roots


def _thinned(roots: list[_Run]) -> list[_Run]:
    """The same trees, if they are at most `MAX_DEPTH` runs deep. Otherwise, from the bottom up, a run is left out where
    one below it has nearly all its readers by cost; those under it begin where it began, and its other readers read it
    for themselves. A run then costs at least 8 / 7 of any below it."""
    depths = [roots]
    while depths[-1]:
        depths.append([child for run in depths[-1] for child in run.children])
    if len(depths) - 1 <= MAX_DEPTH:
        return roots
    left: dict[int, list[_Run]] = {}  # by id: what stands for a run, itself or those under it
    for run in (run for runs in reversed(depths) for run in runs):
        run.children = [other for child in run.children for other in left[id(child)]]
        if any(child.plain_cost >= _NEARLY_ALL * run.plain_cost for child in run.children):
            for child in run.children:
                child.start = run.start
            left[id(run)] = run.children
        else:
            left[id(run)] = [run]
    return [run for root in roots for run in left[id(root)]]


def _num_readers(table: np.ndarray, num_pages: np.ndarray) -> np.ndarray:
    """[S, columns + 1]: how many sequences read the page in an entry; 0 past a sequence's pages and in the last."""
    inside = np.arange(table.shape[1], dtype=np.int32) < num_pages[:, None]
    pages = np.where(inside, table + 1, 0)
    of_page = np.bincount(pages.ravel())
    of_page[0] = 0
    counts = np.zeros((table.shape[0], table.shape[1] + 1), np.int32)
    counts[:, :-1] = of_page.take(pages)
    return counts


def _fill(shared: SharedPrefixes, families: list[_Family], cu_q_lens: np.ndarray, page_size: int) -> None:
    """Writes the families into `shared`, which is empty. Those of a sequence come in the order of their keys."""
    row = 0
    for f, (run, start, level) in enumerate(families):
        tokens = cu_q_lens.take(run.members)
        if run.num_tokens > len(tokens):  # not one query each
            bounds = zip(tokens.tolist(), cu_q_lens.take(run.members + 1).tolist(), strict=True)
            tokens = np.concatenate([np.arange(first, end) for first, end in bounds])
        first, row = row, row + run.num_tokens
        shared.tokens[first:row] = tokens
        shared.rows[tokens, level] = np.arange(first, row)
        shared.cu_q_lens[f + 1 :] = row
        shared.table_rows[f] = run.members[0]
        shared.kv_starts[f], shared.kv_lens[f] = start * page_size, run.stop * page_size
        shared.own_starts[run.members] = run.stop * page_size
    shared.num_families[0] = len(families)

"""Is a forest what it says it is? For tests and debugging: looks at every block."""

from __future__ import annotations

from collections import Counter

from preble_jax.errors import InvariantError
from preble_jax.sched.forest import Forest
from preble_jax.sched.forest_nodes import ANY, Node


def validate_forest(forest: Forest) -> None:
    """Raises InvariantError naming the first broken rule. O(blocks)."""
    held = [0] * len(forest.num_held)
    num_blocks = 0
    stack = [forest.tree.root]
    while stack:
        node = stack.pop()
        num_blocks += len(node.hashes)
        if node is not forest.tree.root:
            _check_node(forest, node)
            for slot in _slots(node):
                held[slot] += len(node.hashes)
        _check_children(forest, node)
        stack.extend(node.children.values())
    _require(num_blocks == len(forest), "blocks reachable from the root", num_blocks, "blocks indexed", len(forest))
    _require(held == forest.num_held, "blocks held by slot", held, "blocks counted", forest.num_held)
    _require(num_blocks <= forest.max_blocks, "blocks", num_blocks, "at most max_blocks", forest.max_blocks)
    for slot in range(len(held)):
        order = list(forest.coldest(slot))
        num_ordered = sum(len(n.hashes) for n in order)
        _require(num_ordered == held[slot], f"slot {slot}: blocks in LRU order", num_ordered, "held", held[slot])
        ticks = [n.last[slot] for n in order]
        _require(ticks == sorted(ticks), f"slot {slot}: ticks in LRU order", ticks, "sorted", sorted(ticks))


def _check_node(forest: Forest, node: Node) -> None:
    where = f"node at {node.start}"
    _require(node.alive and bool(node.hashes), f"{where}: alive", node.alive, "blocks", len(node.hashes))
    strays = [block.hex() for block in node.hashes if forest.tree.node_of(block) is not node]
    _require(not strays, f"{where}: blocks indexed elsewhere", strays, "none", [])
    _check_spans(forest, node, where)
    subjects = {ANY, *_slots(node)}
    _require(set(node.last) == subjects, f"{where}: last used by", set(node.last), "held by", subjects)
    _require(node.pending.keys() <= subjects, f"{where}: optimistic", set(node.pending), "held by", subjects)
    _require(all(n > 0 for n in node.shares.values()), f"{where}: shares", node.shares, "all", "> 0")
    in_use = bool(node.children or node.groups or node.shares)
    _require(in_use, f"{where}: in use", in_use, "in the tree", True)


def _check_spans(forest: Forest, node: Node, where: str) -> None:
    num_blocks = sum(span.num for span in node.spans)
    _require(num_blocks == len(node.hashes), f"{where}: blocks of spans", num_blocks, "blocks", len(node.hashes))
    spans = [span for span in node.spans for _ in range(span.num)]
    found = [forest.tree.span_of.get(block) for block in node.hashes]
    mixed = [block.hex() for block, span, other in zip(node.hashes, spans, found, strict=True) if span is not other]
    _require(not mixed, f"{where}: blocks of other spans", mixed, "none", [])


def _check_children(forest: Forest, node: Node) -> None:
    where = f"below node at {node.start}"
    is_root = node is forest.tree.root
    shares: Counter[int] = Counter()
    for first, child in node.children.items():
        _require(child.parent is node and child.start == node.end, f"{where}: start", child.start, "end", node.end)
        _require(child.hashes[0] == first, f"{where}: first block", child.hashes[0], "key", first)
        shares.update(child.shares)
        if is_root:
            continue
        _require(child.groups & ~node.groups == 0, f"{where}: groups", bin(child.groups), "subset of", bin(node.groups))
        unsure = [s for s in node.pending if child.groups >> s & 1 and child.pending.get(s, -1.0) < 0]
        _require(not unsure, f"{where}: confirmed for slots", unsure, "but optimistic above", node.pending)
        late = [s for s, tick in child.last.items() if tick > node.last[s]]
        _require(not late, f"{where}: last used", child.last, "no later than", node.last)
    if not is_root:
        more = {slot: n for slot, n in shares.items() if n > node.shares.get(slot, 0)}
        _require(not more, f"{where}: shares", more, "at most", node.shares)
        only = next(iter(node.children.values())) if len(node.children) == 1 else None
        _require(only is None or not only.same_use(node), f"{where}: its only child", "same use", "merged", False)


def _slots(node: Node) -> list[int]:
    return [slot for slot in range(node.groups.bit_length()) if node.groups >> slot & 1]


def _require(holds: bool, left: str, left_value: object, right: str, right_value: object) -> None:
    if not holds:
        raise InvariantError(f"forest: {left} {left_value} != {right} {right_value}")

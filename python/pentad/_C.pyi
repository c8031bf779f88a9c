# SPDX-License-Identifier: Apache-2.0
# Array: a torch tensor, a numpy array, or anything with __dlpack__. Outputs are written in place.
from typing import Any, TypeAlias

Array: TypeAlias = Any

__version__: str
hamming_block_rows: int
cuda_on_host: bool
"""Whether this build executes the CUDA kernels on the CPU, in place of the CPU's own."""
hamming_cuda_max_k: int
hamming_max_bytes: int
matrix_chunk: int
pq_product_keys_cuda_max_k: int
scan_chunk: int
sparse_device_most_hits: int
sparse_device_window: int
wavefront_band: int

class DeviceError(RuntimeError):
    """A missing device, one that no kernel serves, or arguments on different devices."""

def isa() -> str:
    """The instruction-set level that kernels use, such as ``"v4x"``."""

def isa_available() -> list[str]:
    """The levels that this processor and this build offer, the lowest first."""

def set_isa(level: str) -> None: ...
def num_threads() -> int:
    """The number of threads that kernels use; where torch is loaded, torch's."""

def set_num_threads(n: int) -> None: ...
def thread_runtime() -> str:
    """Who runs the threads: the OpenMP runtime found in the process, or the package's own pool."""

def cuda_built() -> bool:
    """Whether this build was linked with the CUDA runtime."""

def cuda_devices() -> list[str]:
    """One line for each CUDA device found; empty without a CUDA build."""

def count_tasks(tasks: int) -> int: ...
def stream_read(data: Array) -> int: ...
def best_of(scores: Array, ids: Array, largest: bool, best: Array, best_ids: Array) -> None: ...
def multiply_adds(rounds: int, bf16: bool) -> int: ...
def attention_forward(
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array | None,
    key_mass: Array | None,
    bias: Array | None,
    key_bias: Array | None,
    alibi: Array | None,
    sink: Array | None,
    cu_seqlens_q: Array | None,
    cu_seqlens_k: Array | None,
    k_lengths: Array | None,
    cache_rows: Array | None,
    left_pad: Array | None,
    block_table: Array | None,
    mask: tuple[int, int, Array, Array, Array, Array, Array, Array, Array] | None,
    scale: float | None,
    softcap: float,
    left: int,
    right: int,
    top_left: bool,
    dropout: float,
    seed: Array | None,
    scratch: Array | None = None,
    stream: int = 0,
) -> None: ...
def attention_plain(
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    scale: float | None,
    left: int,
    right: int,
    top_left: bool,
    stream: int = 0,
) -> None: ...
def attention_backward(
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    d_out: Array,
    d_lse: Array | None,
    d_key_mass: Array | None,
    dq: Array | None,
    dk: Array | None,
    dv: Array | None,
    dbias: Array | None,
    dkey_bias: Array | None,
    dsink: Array | None,
    bias: Array | None,
    key_bias: Array | None,
    alibi: Array | None,
    sink: Array | None,
    cu_seqlens_q: Array | None,
    cu_seqlens_k: Array | None,
    mask: tuple[int, int, Array, Array, Array, Array, Array, Array, Array] | None,
    scale: float | None,
    softcap: float,
    left: int,
    right: int,
    top_left: bool,
    dropout: float,
    seed: Array | None,
    scratch: Array | None = None,
    stream: int = 0,
) -> None: ...
def attention_want_hopper(wanted: bool) -> None:
    """Use the kernels for sm_90a where they can: not before a device has verified them."""

def attention_scratch(rows: int) -> int: ...
def attention_decode(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    out: Array,
    lse: Array,
    bias: Array | None,
    alibi: Array | None,
    sink: Array | None,
    lengths: Array,
    cache_rows: Array | None,
    left_pad: Array | None,
    block_table: Array | None,
    scale: float | None,
    softcap: float,
    left: int,
    right: int,
    scratch: Array | None = None,
    stream: int = 0,
) -> None: ...
def attention_decode_scratch(
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    capacity: int,
    value_dim: int,
    element_bytes: int,
) -> int: ...
def attention_append(
    k_new: Array,
    v_new: Array,
    k_cache: Array,
    v_cache: Array,
    cache_lengths: Array,
    cache_rows: Array | None,
    left_pad: Array | None,
    block_table: Array | None,
    stream: int = 0,
) -> None: ...
def hamming_words(bytes: int) -> int: ...
def hamming_pack(x: Array, threshold: float, out: Array, stream: int = 0) -> None: ...
def hamming_unpack(codes: Array, dim: int, out: Array, stream: int = 0) -> None: ...
def hamming_permute(codes: Array, dim: int, shift: int, out: Array, stream: int = 0) -> None: ...
def hamming_distance(
    a: Array, b: Array, metric: str, out: Array, scratch: Array | None = None, stream: int = 0
) -> None: ...
def hamming_distance_scratch(a_rows: int, b_rows: int) -> int: ...
def hamming_topk(
    queries: Array,
    database: Array,
    rows: int,
    ones: Array | None,
    mask: Array | None,
    ids: Array | None,
    offsets: Array | None,
    begin: Array | None,
    end: Array | None,
    metric: str,
    values: Array,
    out_ids: Array,
) -> None: ...
def hamming_topk_cuda(
    queries: Array,
    codes: Array,
    mask: Array | None,
    metric: str,
    values: Array,
    out_ids: Array,
    scratch: Array | None,
    stream: int,
) -> None: ...
def hamming_topk_scratch(queries: int, rows: int, k: int) -> int: ...
def hamming_range(
    queries: Array,
    database: Array,
    rows: int,
    ones: Array | None,
    mask: Array | None,
    ids: Array | None,
    offsets: Array | None,
    begin: Array | None,
    end: Array | None,
    metric: str,
    radius: float,
) -> HammingRange: ...
def hamming_range_cuda(
    queries: Array,
    codes: Array,
    mask: Array | None,
    metric: str,
    radius: float,
    indptr: Array | None,
    values: Array | None,
    ids: Array | None,
    scratch: Array | None,
    stream: int,
) -> None: ...
def hamming_range_scratch(queries: int, rows: int) -> int: ...
def hamming_score(x: Array, codes: Array, out: Array, stream: int = 0) -> None: ...
def hamming_topk_score(
    x: Array,
    database: Array,
    rows: int,
    mask: Array | None,
    ids: Array | None,
    values: Array,
    out_ids: Array,
) -> None: ...
def hamming_topk_lists_cuda(
    queries: Array,
    codes: Array,
    probes: Array,
    borders: Array,
    ids_of: Array,
    mask: Array | None,
    metric: str,
    values: Array,
    out_ids: Array,
    scratch: Array | None,
    stream: int,
) -> None: ...
def hamming_topk_lists_scratch(queries: int, count: int, rows: int, lists: int, k: int) -> int: ...
def hamming_topk_score_cuda(
    x: Array,
    codes: Array,
    mask: Array | None,
    values: Array,
    out_ids: Array,
    scratch: Array | None,
    stream: int,
) -> None: ...
def hamming_topk_score_scratch(queries: int, rows: int, k: int) -> int: ...
def hamming_weighted_sum(
    weights: Array,
    codes: Array,
    dim: int,
    out: Array,
    scratch: Array | None = None,
    stream: int = 0,
) -> None: ...
def hamming_weighted_sum_scratch(batch: int, nq: int, n: int, dim: int) -> int: ...
def hamming_to_blocks(codes: Array, first: int, blocks: Array, ones: Array | None) -> None: ...
def hamming_from_blocks(blocks: Array, rows: int, positions: Array, out: Array) -> None: ...
def hamming_score_candidates(
    x: Array, database: Array, rows: int, candidates: Array, out: Array, stream: int = 0
) -> None: ...
def hamming_dot_candidates(
    x: Array,
    vectors: Array,
    scale: Array | None,
    candidates: Array,
    out: Array,
    stream: int = 0,
) -> None: ...
def selective_scan_forward_scratch(
    batch: int, dim: int, length: int, states: int, complex: bool, sequences: int, packed: bool
) -> int: ...
def selective_scan_backward_scratch(
    batch: int,
    dim: int,
    length: int,
    states: int,
    groups: int,
    complex: bool,
    sequences: int,
    packed: bool,
) -> int: ...
def causal_conv_backward_scratch(batch: int, dim: int, length: int, width: int) -> int: ...
def selective_scan_forward(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    z: Array | None,
    delta_bias: Array | None,
    initial: Array | None,
    cu_seqlens: Array | None,
    softplus: bool,
    reverse: bool,
    complex: bool,
    out: Array,
    last: Array | None,
    stored: Array | None,
    scratch: Array | None = None,
    stream: int = 0,
) -> None: ...
def selective_scan_backward(
    d_out: Array | None,
    d_last: Array | None,
    stored: Array | None,
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    z: Array | None,
    delta_bias: Array | None,
    initial: Array | None,
    cu_seqlens: Array | None,
    softplus: bool,
    reverse: bool,
    complex: bool,
    du: Array,
    ddelta: Array | None,
    dA: Array | None,
    dB: Array | None,
    dC: Array | None,
    dD: Array | None,
    dz: Array | None,
    ddelta_bias: Array | None,
    dinitial: Array | None,
    scratch: Array | None = None,
    stream: int = 0,
) -> None: ...
def selective_state_update(
    state: Array,
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    z: Array | None,
    dt_bias: Array | None,
    softplus: bool,
    rows: Array | None,
    out: Array,
    stream: int = 0,
) -> None: ...
def few_rows_linear(
    x: Array, weight: Array, bias: Array | None, out: Array, stream: int = 0
) -> None: ...
def recurrence_forward(
    a: Array,
    x: Array,
    h0: Array | None,
    h: Array,
    log_space: bool,
    reverse: bool,
    complex: bool,
    stream: int = 0,
) -> None: ...
def recurrence_backward(
    a: Array,
    h0: Array | None,
    h: Array,
    dh: Array,
    da: Array | None,
    dx: Array | None,
    dh0: Array | None,
    log_space: bool,
    reverse: bool,
    complex: bool,
    stream: int = 0,
) -> None: ...
def causal_conv_forward(
    x: Array,
    weight: Array,
    bias: Array | None,
    initial: Array | None,
    seq_idx: Array | None,
    cu_seqlens: Array | None,
    silu: bool,
    out: Array,
    final: Array | None,
    stream: int = 0,
) -> None: ...
def causal_conv_backward(
    d_out: Array,
    d_final: Array | None,
    x: Array,
    weight: Array,
    bias: Array | None,
    initial: Array | None,
    seq_idx: Array | None,
    cu_seqlens: Array | None,
    silu: bool,
    dx: Array | None,
    dweight: Array | None,
    dbias: Array | None,
    dinitial: Array | None,
    scratch: Array | None = None,
    stream: int = 0,
) -> None: ...
def causal_conv_update(
    x: Array,
    state: Array,
    weight: Array,
    bias: Array | None,
    silu: bool,
    rows: Array | None,
    positions: Array | None,
    out: Array,
    stream: int = 0,
) -> None: ...
def cross_scan_forward(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    delta_bias: Array | None,
    order: Array,
    softplus: bool,
    delta_by_step: bool,
    B_by_step: bool,
    C_by_step: bool,
    out: Array,
    stored: Array | None,
) -> None: ...
def cross_scan_backward(
    d_out: Array,
    stored: Array | None,
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    delta_bias: Array | None,
    order: Array,
    softplus: bool,
    delta_by_step: bool,
    B_by_step: bool,
    C_by_step: bool,
    du: Array | None,
    ddelta: Array | None,
    dA: Array | None,
    dB: Array | None,
    dC: Array | None,
    dD: Array | None,
    ddelta_bias: Array | None,
) -> None: ...
def wavefront_forward(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    width: int,
    out: Array,
    stored: Array | None,
) -> None: ...
def wavefront_backward(
    d_out: Array,
    stored: Array | None,
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    width: int,
    du: Array | None,
    ddelta: Array | None,
    dA: Array | None,
    dB: Array | None,
    dC: Array | None,
    dD: Array | None,
) -> None: ...
def matrix_scan_scratch(
    batch: int,
    length: int,
    heads: int,
    groups: int,
    keys: int,
    values: int,
    sequences: int,
    delta: bool,
    key_decay: bool,
    backward: bool,
    stored: bool,
) -> int: ...
def matrix_scan_forward(
    q: Array,
    k: Array,
    v: Array,
    a: Array | None,
    w: Array | None,
    d: Array | None,
    initial: Array | None,
    cu_seqlens: Array | None,
    delta: bool,
    reverse: bool,
    scale: float,
    out: Array,
    last: Array | None,
    stored: Array | None,
    scratch: Array | None = None,
    stream: int = 0,
) -> None: ...
def matrix_scan_backward(
    d_out: Array | None,
    d_last: Array | None,
    stored: Array | None,
    q: Array,
    k: Array,
    v: Array,
    a: Array | None,
    w: Array | None,
    d: Array | None,
    initial: Array | None,
    cu_seqlens: Array | None,
    delta: bool,
    reverse: bool,
    scale: float,
    dq: Array | None,
    dk: Array | None,
    dv: Array | None,
    da: Array | None,
    dw: Array | None,
    dd: Array | None,
    dinitial: Array | None,
    scratch: Array | None = None,
    stream: int = 0,
) -> None: ...
def pq_assign_scratch(n: int, books: int, centroids: int, dim: int, top: int) -> int: ...
def pq_assign(
    x: Array,
    codebooks: Array,
    metric: str,
    codes: Array,
    distances: Array | None,
    scratch: Array | None = None,
    stream: int = 0,
) -> None: ...
def pq_kmeans_start(x: Array, seed: int, centroids: Array) -> None: ...
def pq_kmeans_steps(
    x: Array,
    metric: str,
    iterations: int,
    centroids: Array,
    codes: Array,
    before: Array | None = None,
) -> bool: ...
def matrix_update(
    state: Array,
    q: Array,
    k: Array,
    v: Array,
    a: Array | None,
    w: Array | None,
    d: Array | None,
    delta: bool,
    scale: float,
    rows: Array | None,
    out: Array,
    stream: int = 0,
) -> None: ...
def pq_lookup_scratch(subspaces: int) -> int: ...
def pq_lookup_backward_scratch(
    codes: int, subspaces: int, rows: int, width: int, d_tables: bool
) -> int: ...
def pq_lookup(
    codes: Array,
    codebooks: list[Array] | tuple[Array, ...],
    weights: Array | None,
    offsets: Array | None,
    combine: str,
    out: Array,
    scratch: Array | None = None,
    stream: int = 0,
) -> None: ...
def pq_lookup_backward(
    d_out: Array,
    codes: Array,
    codebooks: list[Array] | tuple[Array, ...],
    weights: Array | None,
    offsets: Array | None,
    combine: str,
    d_tables: Array | None,
    d_weights: Array | None,
    scratch: Array | None = None,
    stream: int = 0,
) -> None: ...
def pq_score_tables(
    queries: Array, codebooks: Array, metric: str, tables: Array, stream: int = 0
) -> None: ...
def pq_table_sum_backward_scratch(codes: int, subspaces: int, queries: int, levels: int) -> int: ...
def pq_table_sum(tables: Array, codes: Array, out: Array, stream: int = 0) -> None: ...
def pq_table_sum_backward(
    d_out: Array, codes: Array, d_tables: Array, scratch: Array | None = None, stream: int = 0
) -> None: ...
def pq_pack_codes(codes: Array, nbits: int, packed: Array, stream: int = 0) -> None: ...
def pq_unpack_codes(packed: Array, nbits: int, out: Array, stream: int = 0) -> None: ...
def pq_hash_codes(
    ids: Array, seeds: list[int], sizes: list[int], out: Array, stream: int = 0
) -> None: ...
def pq_digits(ids: Array, sizes: list[int], out: Array, stream: int = 0) -> None: ...

class HammingRange:
    @property
    def total(self) -> int: ...
    def write(self, indptr: Array, values: Array, ids: Array) -> None: ...

pq_block_rows: int
pq_max_subspaces: int

def pq_block_shape(M: int, nbits: int) -> tuple[int, ...]: ...
def pq_to_blocks(codes: Array, nbits: int, first: int, blocks: Array) -> None: ...
def pq_from_blocks(
    blocks: Array, nbits: int, M: int, rows: int, positions: Array, out: Array
) -> None: ...
def pq_topk(
    tables: Array,
    offset: Array | None,
    blocks: Array,
    nbits: int,
    M: int,
    rows: int,
    scale: Array | None,
    bias: Array | None,
    mask: Array | None,
    ids: Array | None,
    range_offsets: Array | None,
    range_begin: Array | None,
    range_end: Array | None,
    range_table: Array | None,
    range_offset: Array | None,
    values: Array,
    found: Array,
) -> None: ...
def pq_range(
    tables: Array,
    offset: Array | None,
    blocks: Array,
    nbits: int,
    M: int,
    rows: int,
    scale: Array | None,
    bias: Array | None,
    mask: Array | None,
    ids: Array | None,
    range_offsets: Array | None,
    range_begin: Array | None,
    range_end: Array | None,
    range_table: Array | None,
    range_offset: Array | None,
    radius: float,
) -> PqRange: ...
def pq_rescore(
    x: Array, vectors: Array, scale: Array | None, candidates: Array, l2: bool, out: Array
) -> None: ...

class PqRange:
    @property
    def total(self) -> int: ...
    def write(self, indptr: Array, values: Array, ids: Array) -> None: ...

pq_most_subkeys: int

def pq_product_keys_scratch(rows: int, heads: int, keys: int, k: int) -> int: ...
def pq_product_keys_backward_scratch(
    rows: int, heads: int, keys: int, half: int, k: int, dv: int, value_rows: int
) -> int: ...
def pq_product_keys(
    q: Array,
    subkeys: Array,
    values: Array,
    k: int,
    scale: float,
    softmax: bool,
    per_head: bool,
    out: Array,
    indices: Array,
    weights: Array,
    scratch: Array | None = None,
    stream: int = 0,
) -> None: ...
def pq_product_keys_backward(
    q: Array,
    subkeys: Array,
    values: Array,
    scale: float,
    softmax: bool,
    per_head: bool,
    indices: Array,
    weights: Array,
    d_out: Array | None,
    d_weights: Array | None,
    d_q: Array | None,
    d_subkeys: Array | None,
    d_values: Array | None,
    touched: Array | None,
    places: Array | None = None,
    scratch: Array | None = None,
    stream: int = 0,
) -> None: ...
def pq_count_distinct(indices: Array, limit: int) -> int: ...
def sparse_check(
    op: str, name: str, indptr: Array, indices: Array, values: Array, columns: int
) -> tuple[bool, int]: ...
def sparse_merge(
    op: str,
    name: str,
    indptr: Array,
    indices: Array,
    values: Array,
    columns: int,
    out_indptr: Array,
    out_indices: Array,
    out_values: Array,
    place: Array,
) -> int: ...
def sparse_score(
    q_indptr: Array,
    q_indices: Array,
    q_values: Array,
    d_indptr: Array,
    d_indices: Array,
    d_values: Array,
    pairs: Array | None,
    columns: int,
    out: Array,
) -> None: ...
def sparse_score_backward(
    d_out: Array,
    q_indptr: Array,
    q_indices: Array,
    q_values: Array,
    d_indptr: Array,
    d_indices: Array,
    d_values: Array,
    pairs: Array | None,
    columns: int,
    d_queries: Array | None,
    d_docs: Array | None,
) -> None: ...
def sparse_splade_scratch(batch: int, length: int) -> int: ...
def sparse_splade_backward_scratch(
    batch: int, length: int, dim: int, vocabulary: int, element_bytes: int, sum_pooling: bool
) -> int: ...
def sparse_splade_head(
    hidden: Array,
    weight: Array,
    bias: Array | None,
    mask: Array | None,
    pooling: str,
    activation: str,
    out: Array,
    top: Array | None,
    place: Array | None,
    scratch: Array | None = None,
    stream: int = 0,
) -> None: ...
def sparse_splade_head_backward(
    d_out: Array,
    hidden: Array,
    weight: Array,
    bias: Array | None,
    mask: Array | None,
    top: Array | None,
    place: Array | None,
    pooling: str,
    activation: str,
    d_hidden: Array | None,
    d_weight: Array | None,
    d_bias: Array | None,
    scratch: Array | None = None,
    stream: int = 0,
) -> None: ...
def sparse_splade_keep(x: Array, k: int) -> None: ...
def sparse_splade_count(x: Array, indptr: Array) -> None: ...
def sparse_splade_compress(x: Array, indptr: Array, indices: Array, values: Array) -> None: ...
def sparse_topk(
    x: Array, k: int, absolute: bool, indices: Array, values: Array | None, stream: int = 0
) -> None: ...
def sparse_topk_sparsify(x: Array, k: int, absolute: bool, out: Array, stream: int = 0) -> None: ...

sparse_window: int

class SparseWindowBuilder:
    @property
    def count(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def write(self, terms: Array, starts: Array, scales: Array, postings: Array) -> None: ...

def sparse_build(
    indptr: Array, terms: Array, values: Array, scale: Array | None, first: int, last: int
) -> SparseWindowBuilder: ...
def sparse_defect(
    terms: Array, starts: Array, scales: Array, postings: Array, documents: int
) -> str | None: ...
def sparse_score_scratch(queries: int, columns: int) -> int: ...
def sparse_score_cuda(
    q_indptr: Array,
    q_indices: Array,
    q_values: Array,
    d_indptr: Array,
    d_indices: Array,
    d_values: Array,
    columns: int,
    out: Array,
    scratch: Array | None,
    stream: int,
) -> None: ...
def sparse_score_backward_scratch(
    queries: int, docs: int, query_entries: int, doc_entries: int, columns: int
) -> int: ...
def sparse_score_backward_cuda(
    d_out: Array,
    q_indptr: Array,
    q_indices: Array,
    q_values: Array,
    d_indptr: Array,
    d_indices: Array,
    d_values: Array,
    columns: int,
    d_queries: Array | None,
    d_docs: Array | None,
    scratch: Array | None,
    stream: int,
) -> None: ...
def sparse_score_pairs_cuda(
    q_indptr: Array,
    q_indices: Array,
    q_values: Array,
    d_indptr: Array,
    d_indices: Array,
    d_values: Array,
    query: Array,
    doc: Array,
    out: Array,
    stream: int,
) -> None: ...
def sparse_score_pairs_backward_cuda(
    d_out: Array,
    indptr: Array,
    indices: Array,
    values: Array,
    o_indptr: Array,
    o_indices: Array,
    o_values: Array,
    starts: Array,
    order: Array,
    other: Array,
    out: Array,
    stream: int,
) -> None: ...
def sparse_search_scratch(queries: int, documents: int, k: int) -> int: ...
def sparse_search_cuda(
    windows: Array,
    list_terms: Array,
    starts: Array,
    places: Array,
    values: Array,
    documents: int,
    q_indptr: Array,
    q_indices: Array,
    q_values: Array,
    mask: Array | None,
    scores: Array,
    ids: Array,
    scratch: Array | None,
    stream: int,
) -> None: ...

class SparseLists:
    """The windows and rows of a `SparseIndex`, held for its searches."""

    def __init__(
        self, windows: list, indptr: object, terms: object, values: object, scale: object
    ) -> None: ...
    def search(
        self,
        op: str,
        query_indptr: Array,
        query_indices: Array,
        query_weights: Array,
        columns: int,
        mask: Array | None,
        k: int,
        query_cut: int,
        block_factor: float,
        alpha: float,
        scores: Array,
        positions: Array,
    ) -> None: ...

def sparse_scores_at(
    indptr: Array,
    terms: Array,
    values: Array,
    scale: Array | None,
    query_indptr: Array,
    query_terms: Array,
    query_weights: Array,
    positions: Array,
    scores: Array,
) -> None: ...

// SPDX-License-Identifier: Apache-2.0
// The entries: a problem for the device, its scratch memory, and the order of the kernels.
#include "scan/matrix_chunk.cuh"

namespace pentad::scan::cuda {

Problem::Problem(const MatrixScan& p, const Packed& packed)
    : batch(p.batch),
      length(p.length),
      heads(p.heads),
      groups(p.groups),
      keys(p.keys),
      values(p.values),
      sequences(packed.sequences),
      chunks(packed.sequences
                 ? stored_matrices(p.batch, p.length, packed.begin.data, packed.sequences)
                 : 0),
      delta(p.delta),
      reverse(p.reverse),
      key_decay(p.key_decay),
      scale(static_cast<float>(p.scale)),
      q(p.q),
      k(p.k),
      v(p.v),
      a(p.a),
      w(p.w),
      d(p.d),
      initial(p.initial),
      begin(packed.begin) {}

Workspace::Workspace(const Problem& p, bool backward, bool stored, void* memory) : bytes(0) {
  const auto take = [&](bool wanted, int64_t of_head) -> float* {
    if (!wanted) return nullptr;
    float* const taken =
        memory ? reinterpret_cast<float*>(static_cast<char*>(memory) + bytes) : nullptr;
    bytes += static_cast<int64_t>(shared_bytes<float>(p.chunks * p.heads * of_head));
    return taken;
  };
  const int64_t state = p.keys * p.values, pairs = kQ * kQ;
  states = take(!backward && !stored, state);
  gradients = take(backward, state);
  this->pairs = take(true, pairs);
  inverse = take(p.delta, pairs);
  inverse_back = take(backward && p.delta, pairs);
  errors = take(p.delta, kQ * p.values);
  d_errors = take(backward && p.delta, kQ * p.values);
  q_decayed = take(p.key_decay, kQ * p.keys);
  k_tail = take(p.key_decay, kQ * p.keys);
  k_decayed = take(p.key_decay && p.delta, kQ * p.keys);
  whole = take(p.key_decay, p.keys);
  dots = take(backward, pairs);
  dots_back = take(backward && p.delta, pairs);
  sy = take(backward, kQ * p.keys);
  gu = take(backward, kQ * p.keys);
  sd = take(backward && p.delta, kQ * p.keys);
  both = take(backward, p.keys);
  dd = take(backward, p.values);
  dq = dk = nullptr;
  const int64_t pieces = pieces_of(p);
  if (!backward || pieces == 1) return;
  const int64_t rows = p.batch * p.length * p.groups * p.keys;
  for (float** parts : {&dq, &dk}) {
    if (memory) *parts = reinterpret_cast<float*>(static_cast<char*>(memory) + bytes);
    bytes += static_cast<int64_t>(shared_bytes<float>(pieces * rows));
  }
}

int64_t matrix_forward_scratch(const MatrixScan& p, const Packed& packed, bool stored) {
  return Workspace(Problem(p, packed), false, stored, nullptr).bytes;
}

void matrix_forward(const CudaStream& stream, const MatrixScan& scan, const Packed& packed,
                    const Operand& out, const Operand& last, float* stored, void* scratch) {
  const Problem p(scan, packed);
  Workspace ws(p, false, stored, scratch);
  if (stored) ws.states = stored;
  decay_rows(stream, p, ws);
  make_pairs(stream, p, ws);
  walk_states(stream, p, ws, {{}, p.initial, last, false});
  make_outputs(stream, p, ws, out);
}

int64_t matrix_backward_scratch(const MatrixScan& p, const Packed& packed) {
  return Workspace(Problem(p, packed), true, true, nullptr).bytes;
}

void matrix_backward(const CudaStream& stream, const MatrixScan& scan, const Packed& packed,
                     const MatrixScanGradients& g, void* scratch) {
  const Problem p(scan, packed);
  Workspace ws(p, true, true, scratch);
  ws.states = const_cast<float*>(g.stored);
  decay_rows(stream, p, ws);
  make_pairs(stream, p, ws);
  if (p.delta) make_errors(stream, p, ws, g.d_out);
  walk_states(stream, p, ws, {g.d_out, g.d_last, g.dinitial, true});
  value_gradients(stream, p, ws, g);
  if (!(g.dq.data || g.dk.data || g.da.data)) return;
  state_gradients(stream, p, ws, g.d_out);
  if (p.key_decay) {
    key_decay_gradients(stream, p, ws, g);
  } else {
    key_gradients(stream, p, ws, g);
    decay_gradients(stream, p, ws, g.da);
  }
  add_key_pieces(stream, p, ws, g);
}

}  // namespace pentad::scan::cuda

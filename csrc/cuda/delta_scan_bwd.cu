// Gradients of the scan: every segment of the tape from the gradient at its end back to its start.
//
//     g_{t-1} = keep g - erase h k + dr q        a = s.k    h = g.k    per row, s = S_{t-1}, g = dS_t
//     dq = sum_rows dr s       dk = sum_rows (write v - erase a) g - erase h s       dv = write h
//     dkeep = g.s              derase = -a h                                         dwrite = v h
//
//     maps_kernel (delta_scan_maps.cuh)    the gradient at the end of each segment; none where they are whole
//     reverse_kernel                       every part of tape_len tokens forward from the tape, leaving one
//                                          state every kBlock tokens in memory (it stays in the second-level
//                                          cache), then backward: kBlock states at a time in registers
//     sum_bias_kernel, sum_states_kernel   what segments leave to a head or a row, in their order
//
// Consuming lanes touch nothing but shared memory and those states. Producing threads load chunks ahead of
// them, and take the gradients of the chunk behind through activations and gates to memory.
#include "cuda/delta_scan_gradients.cuh"

namespace deltamem::cuda {
namespace {

// Block: kUnits segments of heads.
template <int RP>
__global__ void __launch_bounds__(ReverseShape<RP>::kThreads, ReverseShape<RP>::kBlocks)
    reverse_kernel(const __grid_constant__ ReverseArgs p) {
  using S = ReverseShape<RP>;
  const ReverseMemory<S> shared(Carver::of_block());
  const int thread = ptx::thread();
  const int longest = find_segments<S>(p.scan, shared.segments);
  Cursor<S> at(p.scan, longest);

  if (thread >= S::kConsumers) {
    const int producer = thread - S::kConsumers;
    ReverseProducer<S> own(p, shared.segments[producer / S::kPieces % S::kUnits], producer);
    Cursor<S> ahead = at;
    for (int i = 0;; ++i) {
      if (!ahead.done()) {
        own.stage(shared.in(i), ahead);
        ahead.advance();
      }
      ptx::sync_named(1, S::kThreads);  // chunk i is here, i - 1 done with
      if (i > 0) {
        own.drain(shared.in(i - 1), shared.out(i - 1), at);
        at.advance();
      }
      if (at.done()) break;
    }
    own.sum_biases(shared.in(0));
    ptx::wait_for_previous_kernel();
  } else {
    ptx::wait_for_previous_kernel();
    ReverseLane<S> lane(p, shared.segments[thread / S::kLanes], thread);
    for (int i = 0; !at.done(); ++i, at.advance()) {
      ptx::sync_named(1, S::kThreads);
      if (!at.back && at.chunk == 0) lane.begin_part(at.part_begin());
      lane.take(shared.in(i), shared.out(i), at);
    }
    ptx::sync_named(1, S::kThreads);
    lane.finish();
  }
  clear_past_end(p.scan, p.dmem_q, S::kThreads);
  clear_past_end(p.scan, p.dmem_k, S::kThreads);
  clear_past_end(p.scan, p.dmem_v, S::kThreads);
  clear_past_end(p.scan, p.dbeta, S::kThreads);
  clear_past_end(p.scan, p.dlam, S::kThreads);
}

// d [H, 1 or R] = the sum of bias_parts over slots: of kLines running sums, then their tree. Block: a head
// and gate.
inline constexpr int kSumThreads = 1024;
__global__ void __launch_bounds__(kSumThreads)
    sum_bias_kernel(const __grid_constant__ Tensor dbeta_bias, const __grid_constant__ Tensor dlam_bias,
                    const float* parts, int slots, int heads, int RP) {
  float* sums = Carver::of_block().take<float>(kSumThreads);  // [lines, RP]
  const int thread = ptx::thread(), column = thread % RP, lines = kSumThreads / RP;
  const int gate = static_cast<int>(ptx::block() % 2), head = static_cast<int>(ptx::block() / 2);
  const Tensor& d = gate == 0 ? dbeta_bias : dlam_bias;
  if (!d) return;
  float sum = 0.0f;
#pragma unroll 4
  for (int slot = thread / RP; slot < slots; slot += lines) {
    sum += parts[((int64_t{slot} * heads + head) * 2 + gate) * RP + column];
  }
  sums[thread] = sum;
  for (int left = lines / 2; left > 0; left /= 2) {
    ptx::sync_block();
    if (thread < left * RP) sums[thread] += sums[thread + left * RP];
  }
  if (thread < d.size[1]) d.at<float>(head)[thread] = sums[thread];
}

// dS of read-only tokens: dfinal_state and what segments leave, in order. Thread: an element of a state.
__global__ void __launch_bounds__(256) sum_states_kernel(const __grid_constant__ ReverseArgs p, int RP) {
  const int R = p.scan.plan.rank, H = p.scan.plan.heads;
  const int64_t i = ptx::block() * 256 + ptx::thread(), state = i / (R * R);
  const int column = static_cast<int>(i % R), row = static_cast<int>(i / R % R),
            head = static_cast<int>(state % H);
  if (state >= int64_t{p.scan.plan.rows} * H) return;
  const int n = static_cast<int>(state / H), L = p.scan.plan.segment_len;
  const Span span = row_span(p.scan.rows, n, p.scan.plan.tokens);
  const int first = p.scan.plan.first_slot(p.scan.rows, n, static_cast<int>(span.start), L);
  const int count = span.length > 0 ? static_cast<int>(span.length - 1) / L + 1 : 1;
  float sum = p.scan.start ? *(p.scan.start.at<float>(n, head, row) + column) : 0.0f;
  for (int s = 0; s < count; ++s) {
    sum += p.state_parts[(int64_t{first + s} * H + head) * RP * RP + row * RP + column];
  }
  *(p.dinitial_state.at<float>(n, head, row) + column) = sum;
}

template <int RP>
void launch_reverse(Call& call, ReverseArgs& p, const Tensor& dbeta_bias, const Tensor& dlam_bias) {
  using S = ReverseShape<RP>;
  const ScanPlan& plan = p.scan.plan;
  const int64_t items = int64_t{plan.slots[0]} * plan.heads, blocks = ceil_div(items, int64_t{S::kUnits});
  const int part = plan.tokens < p.scan.tape_len ? plan.tokens : p.scan.tape_len;
  p.steps = (part + S::kBlock - 1) / S::kBlock;
  const bool write = p.scan.memory.write, has_bias = dbeta_bias || dlam_bias;
  if (write) p.checkpoints = call.allocate_array<float>(blocks * p.steps * S::kColumns * S::kConsumers);
  if (!write) p.state_parts = call.allocate_array<float>(items * RP * RP);
  if (has_bias) p.bias_parts = call.allocate_array<float>(items * 2 * RP);
  launch<reverse_kernel<RP>>(call,
                             {.blocks = blocks,
                              .threads = S::kThreads,
                              .shared_bytes = ReverseMemory<S>(Carver()).bytes,
                              .overlaps_previous = plan.mapped},
                             p);
  if (has_bias) {
    launch<sum_bias_kernel>(call,
                            {.blocks = 2 * plan.heads,
                             .threads = kSumThreads,
                             .shared_bytes = kSumThreads * sizeof(float) + ptx::kRedZone},
                            dbeta_bias, dlam_bias, static_cast<const float*>(p.bias_parts), plan.slots[0],
                            plan.heads, RP);
  }
  if (!write && p.dinitial_state) {
    const int64_t elements = int64_t{plan.rows} * plan.heads * plan.rank * plan.rank;
    launch<sum_states_kernel>(call, {.blocks = ceil_div(elements, int64_t{256}), .threads = 256}, p, RP);
  }
}

}  // namespace

void delta_scan_bwd(const DeltaScanBwdParams& p, Call& call) {
  ReverseArgs args;
  ScanArgs& scan = args.scan;
  scan.memory = p.fwd.memory, scan.rows = p.fwd.rows;
  scan.plan = plan_scan(p.fwd.memory, p.fwd.rows, p.fwd.segment_len, false, true);
  scan.start = p.dfinal_state, scan.tape = p.fwd.tape, scan.dreads = p.dreads;
  scan.tape_len = static_cast<int>(p.fwd.segment_len);
  args.initial_state = p.fwd.initial_state;
  args.dmem_q = p.dmem_q, args.dmem_k = p.dmem_k, args.dmem_v = p.dmem_v;
  args.dbeta = p.dbeta, args.dlam = p.dlam, args.dinitial_state = p.dinitial_state;
  if (scan.plan.mapped) launch_maps<true>(call, scan);
  switch (padded_rank(scan.plan.rank)) {
    case 8:
      return launch_reverse<8>(call, args, p.dbeta_bias, p.dlam_bias);
    case 16:
      return launch_reverse<16>(call, args, p.dbeta_bias, p.dlam_bias);
    case 32:
      return launch_reverse<32>(call, args, p.dbeta_bias, p.dlam_bias);
    default:
      return launch_reverse<64>(call, args, p.dbeta_bias, p.dlam_bias);
  }
}

}  // namespace deltamem::cuda

// The affine maps of segments and their products: where every segment's state starts.
//
// A segment takes row i of the state from s to s M_i + b_i. Its map is RP + 1 vectors that pass through the
// same recurrence: the unit vectors, which become the rows of M_i, and 0 with the writes on, which becomes
// b_i. Where all rows share their gates there is one M; lane i then carries unit vector i beside its b_i.
//
// The reverse pass takes g = dS through the same symmetric token maps in the opposite order, with dreads q in
// place of write v k: kReverse. "First" and "before" are then meant in that order.
//
// A block takes a group: the running products of its maps go to segment_maps. The last block of a supergroup
// to arrive does the same with the groups' totals, to group_maps; the last of a sequence carries the state
// through the supergroups, to starts. Whoever comes last computes the same in the same order. A segment then
// starts two products behind its supergroup: carry_to_segment.
#pragma once

#include "cuda/delta_scan_tokens.cuh"
#include "cuda/launch.cuh"

namespace deltamem::cuda {

template <int kRP, bool kOneMap>
struct MapShape {
  static constexpr int RP = kRP;
  static constexpr int kUnits = group_of(RP);       // segments of a block: a group
  static constexpr int kVectors = kOneMap ? 2 : 3;  // of a lane
  static constexpr int kTurns = kOneMap ? 1 : (RP + 1 + kVectors - 1) / kVectors;  // lanes of a row
  static constexpr int kLanes = RP * kTurns;                                       // of a segment
  static constexpr int kConsumers = kUnits * kLanes;
  static constexpr int kThreads = kConsumers + kProducers;
  static constexpr int kBlocks = RP == 16 ? 1 : kOneMap ? 3 : 2;  // of a multiprocessor
  static constexpr int kPieces = RP / kPiece, kPitch = kUnits * RP;
  static constexpr int kChunk = kChunkFloats / kPitch;  // tokens
  static constexpr int kMatrices = kOneMap ? 1 : RP;
  static constexpr int kSize = (kMatrices + 1) * RP * RP;  // floats of a map: [kMatrices, RP, RP], b [RP, RP]
  // In shared memory the rows' matrices stand 4 floats apart, so that lanes of 8 rows read from all banks.
  static constexpr int kMatrixPitch = RP * RP + 4;
  static constexpr int kSharedSize = kMatrices * kMatrixPitch + RP * RP;
  // Tokens and maps take turns in one piece of it; kRound maps at a time.
  static constexpr int kChunks = 2 * 5 * kChunkFloats, kMaps = kUnits * kSharedSize;
  static constexpr int kWork = kChunks > kMaps ? kChunks : kMaps;
  static constexpr int kRound = kWork / kSharedSize;
  static constexpr int kComposers = kOneMap ? 2 * RP : RP * (RP + 1);  // vectors of a map
  static_assert(kComposers <= kThreads && kConsumers % 32 == 0);
};

template <class S>
struct MapMemory {
  Segment* segments;
  int* arrived;
  float* work;  // two chunks of tokens, then maps
  size_t bytes;

  DELTAMEM_HD explicit MapMemory(Carver carver)
      : segments(carver.take<Segment>(S::kUnits)),
        arrived(carver.take<int>(1)),
        work(carver.take<float>(S::kWork)),
        bytes(carver.used()) {}

  DELTAMEM_DEVICE Chunk chunk(int i) const { return Chunk(work + i % 2 * 5 * kChunkFloats); }
  DELTAMEM_DEVICE float* map(int i) const { return work + i * S::kSharedSize; }
};

// x = x M + b, b optional. m [RP, RP], b [RP], aligned to 16 bytes. A few lines of a large M are under way at
// a time: all of it would be more than a lane's registers.
template <int RP>
DELTAMEM_DEVICE void apply_map(float (&x)[RP], const float* m, const float* b) {
  constexpr int kLines = RP == 8 ? 8 : 4;
  float y[RP] = {};
  if (b != nullptr) load_row(b, y);
#pragma unroll 1
  for (int first = 0; first < RP; first += kLines, m += kLines * RP) {
#pragma unroll
    for (int c = 0; c < kLines; ++c) {
      float line[RP];
      load_row(m + c * RP, line);
#pragma unroll
      for (int j = 0; j < RP; ++j) y[j] = fmaf(x[c], line[j], y[j]);
    }
#pragma unroll
    for (int j = 0; j + kLines < RP; ++j) x[j] = x[j + kLines];
  }
#pragma unroll
  for (int j = 0; j < RP; ++j) x[j] = y[j];
}

// Where the maps of a sequence's segments, groups and supergroups begin, and how many there are.
struct Tree {
  int segment_slot, group_slot, supergroup_slot;
  int segments, groups, supergroups;

  DELTAMEM_DEVICE Tree(const ScanArgs& p, const Segment& x) {
    const int L = p.plan.segment_len, group = p.plan.group_len(), supergroup = p.plan.supergroup_len();
    segment_slot = p.plan.first_slot(p.rows, x.row, x.sequence_start, L);
    group_slot = p.plan.first_slot(p.rows, x.row, x.sequence_start, group);
    supergroup_slot = p.plan.first_slot(p.rows, x.row, x.sequence_start, supergroup);
    const int last = x.sequence_length > 0 ? x.sequence_length - 1 : 0;
    segments = last / L + 1, groups = last / group + 1, supergroups = last / supergroup + 1;
  }

  // Of the map of (slot, head) among maps of `size` floats.
  DELTAMEM_DEVICE static int64_t place(const ScanArgs& p, int slot, int head, int size) {
    return (int64_t{slot} * p.plan.heads + head) * size;
  }
};

// Members [begin, begin + count) of a level.
struct Members {
  int begin, count;
  template <bool kReverse>
  DELTAMEM_DEVICE int nth(int i) const {
    return kReverse ? begin + count - 1 - i : begin + i;
  }
};
DELTAMEM_DEVICE Members members_of(int parent, int fan, int all) {
  const int begin = parent * fan, left = all - begin;
  return {begin, left < fan ? left : fan};
}

// The vectors of a lane over one chunk of its segment, of `count` tokens.
template <class S, bool kReverse>
DELTAMEM_DEVICE void map_tokens(const Chunk& chunk, int count, int place, int row, bool has_bias,
                                float (&x)[S::kVectors][S::RP]) {
  constexpr int RP = S::RP;
#pragma unroll(RP == 8 ? 2 : 1)
  for (int t = 0; t < count; ++t, place += S::kPitch) {
    float k[RP];
    load_row(chunk.k + place, k);
    const float keep = chunk.keep[place + row], erase = chunk.erase[place + row];
    const float put = has_bias ? chunk.put[place + row] : 0.0f;
#pragma unroll
    for (int v = 0; v < S::kVectors; ++v) {
      const bool is_last = v == S::kVectors - 1;
      const float u = fmaf(-erase, dot(x[v], k), is_last && !kReverse ? put : 0.0f);
#pragma unroll
      for (int j = 0; j < RP; ++j) x[v][j] = fmaf(u, k[j], keep * x[v][j]);
      if (kReverse && is_last) {
        float q[RP];
        load_row(chunk.q + place, q);
#pragma unroll
        for (int j = 0; j < RP; ++j) x[v][j] = fmaf(put, q[j], x[v][j]);
      }
    }
  }
}

// One composing thread: a vector of the running product.
template <class S>
struct Composer {
  int row, line;  // which matrix multiplies it; which of its lines the vector is
  bool is_bias, active;
  float x[S::RP];

  DELTAMEM_DEVICE explicit Composer(int thread)
      : row(thread % S::RP),
        line(S::kMatrices == 1 ? thread % S::RP : thread / S::RP),
        is_bias(thread >= S::kComposers - S::RP),
        active(thread < S::kComposers) {}

  DELTAMEM_DEVICE static const float* matrix_of(const float* map, int row) {
    return map + (S::kMatrices == 1 ? 0 : row) * S::kMatrixPitch;
  }
  DELTAMEM_DEVICE static const float* bias_of(const float* map, int row) {
    return map + S::kMatrices * S::kMatrixPitch + row * S::RP;
  }

  // Multiplies by a map in shared memory, and stores the product.
  DELTAMEM_DEVICE void pass(const float* map, bool first, float* product) {
    const float *m = matrix_of(map, row), *b = bias_of(map, row);
    if (first) {
      load_row(is_bias ? b : m + line * S::RP, x);
    } else {
      apply_map(x, m, is_bias ? b : nullptr);
    }
    const int matrix = S::kMatrices == 1 ? 0 : row;
    const int64_t place =
        is_bias ? S::kMatrices * S::RP * S::RP + row * S::RP : (matrix * S::RP + line) * S::RP;
    store_row(product + place, x);
  }
};

// target [kSharedSize] = a map that another block may have stored; all threads.
template <class S>
DELTAMEM_DEVICE void fetch_map(const float* source, float* target) {
  constexpr int kMatrix = S::RP * S::RP;
  for (int i = ptx::thread() * 4; i < S::kSize; i += S::kThreads * 4) {
    const float4 x = ptx::load_shared_by_blocks(reinterpret_cast<const float4*>(source + i));
    *reinterpret_cast<float4*>(target + i / kMatrix * S::kMatrixPitch + i % kMatrix) = x;
  }
}

// Does this block find all others of `members` arrived, with what they stored?
DELTAMEM_DEVICE bool arrive_last(uint32_t* counter, int members, int* arrived) {
  ptx::fence();
  ptx::sync_block();
  if (ptx::thread() == 0) {
    *arrived =
        ptx::atomic_inc(counter, static_cast<uint32_t>(members - 1)) + 1 == static_cast<uint32_t>(members);
  }
  ptx::sync_block();
  const bool last = *arrived != 0;
  if (last) ptx::fence();
  return last;
}

// The running products of a supergroup's groups; with kRound maps in shared memory at a time.
template <class S, bool kReverse>
DELTAMEM_DEVICE void compose_groups(const ScanArgs& p, const Tree& tree, int supergroup, int head,
                                    const MapMemory<S>& shared) {
  const Members groups = members_of(supergroup, kSupergroup, tree.groups);
  Composer<S> composer(ptx::thread());
  for (int begin = 0; begin < groups.count; begin += S::kRound) {
    ptx::sync_block();
    const int end = groups.count < begin + S::kRound ? groups.count : begin + S::kRound;
    for (int i = begin; i < end; ++i) {
      const Members segments = members_of(groups.nth<kReverse>(i), S::kUnits, tree.segments);
      const int slot = tree.segment_slot + segments.nth<kReverse>(segments.count - 1);
      fetch_map<S>(p.segment_maps + Tree::place(p, slot, head, S::kSize), shared.map(i - begin));
    }
    ptx::sync_block();
    for (int i = begin; i < end && composer.active; ++i) {
      const int slot = tree.group_slot + groups.nth<kReverse>(i);
      composer.pass(shared.map(i - begin), i == 0, p.group_maps + Tree::place(p, slot, head, S::kSize));
    }
  }
}

// The state that sequence x.row starts from (reverse: its gradient at the end), channels of one row.
template <int kCount>
DELTAMEM_DEVICE void load_start(const ScanArgs& p, const Segment& x, int row, int first, float (&s)[kCount]) {
  clear(s);
  const bool has_state = p.start && x.exists && !x.padding && row < p.plan.rank &&
                         (!p.has_start || *p.has_start.at<bool>(x.row));
  if (!has_state) return;
  const int64_t slot = p.start_slots ? *p.start_slots.at<int32_t>(x.row) : x.row;
  load_channels(p.start, p.start.offset(slot, x.head, row), first, p.plan.rank, s);
}

// Carries the state through the supergroups of a sequence, one lane per row.
template <class S, bool kReverse>
DELTAMEM_DEVICE void carry_supergroups(const ScanArgs& p, const Tree& tree, const Segment& own,
                                       const MapMemory<S>& shared) {
  constexpr int RP = S::RP;
  const int row = ptx::thread();
  const Members supergroups = {0, tree.supergroups};
  float s[RP];
  if (row < RP) load_start(p, own, row, 0, s);
  for (int begin = 0; begin < tree.supergroups; begin += S::kRound) {
    ptx::sync_block();
    const int end = tree.supergroups < begin + S::kRound ? tree.supergroups : begin + S::kRound;
    for (int i = begin; i < end && i + 1 < tree.supergroups; ++i) {  // nothing starts behind the last
      const Members groups = members_of(supergroups.nth<kReverse>(i), kSupergroup, tree.groups);
      const int slot = tree.group_slot + groups.nth<kReverse>(groups.count - 1);
      fetch_map<S>(p.group_maps + Tree::place(p, slot, own.head, S::kSize), shared.map(i - begin));
    }
    ptx::sync_block();
    for (int i = begin; i < end && row < RP; ++i) {
      const int slot = tree.supergroup_slot + supergroups.nth<kReverse>(i);
      store_row(p.starts + Tree::place(p, slot, own.head, RP * RP) + row * RP, s);
      if (i + 1 == tree.supergroups) break;
      const float* map = shared.map(i - begin);
      apply_map(s, Composer<S>::matrix_of(map, row), Composer<S>::bias_of(map, row));
    }
  }
}

// Block: a group of segments of one head.
template <int RP, bool kOneMap, bool kReverse>
__global__ void __launch_bounds__(MapShape<RP, kOneMap>::kThreads, MapShape<RP, kOneMap>::kBlocks)
    maps_kernel(const __grid_constant__ ScanArgs p) {
  using S = MapShape<RP, kOneMap>;
  ptx::let_next_kernel_start();
  MapMemory<S> shared(Carver::of_block());
  const int thread = ptx::thread();
  const int L = p.plan.segment_len;
  const Segment group = find_segment(p, static_cast<int>(ptx::block()), p.plan.group_len());
  if (!group.exists) return;
  const Tree tree(p, group);
  const Members segments = members_of(group.index, S::kUnits, tree.segments);
  if (thread < S::kUnits) {
    Segment x = group;
    const int left = thread < segments.count ? group.count - thread * L : 0;
    x.begin += group.count - left;
    x.count = left < L ? left : L;
    shared.segments[thread] = x;
  }
  ptx::sync_block();

  const int longest = group.count < L ? group.count : L;
  const int chunks = ceil_div(longest, S::kChunk);
  if (thread >= S::kConsumers) {
    const int producer = thread - S::kConsumers, unit = producer / S::kPieces % S::kUnits;
    const int own = producer / (S::kPieces * S::kUnits);  // token of every chunk
    const Segment segment = shared.segments[unit];
    const TokenLoader<S::kPieces> loader(p.memory, p.rows, segment, producer % S::kPieces);
    for (int c = 0; c <= chunks; ++c) {
      const int t = c * S::kChunk + own;
      if (c < chunks) {
        const int token = kReverse ? segment.count - 1 - t : t;
        const Chunk chunk = shared.chunk(c);
        stage_token<kReverse>(p.memory, loader, token, chunk, producer * kPiece);
        if (kReverse) {
          float dreads[kPiece];
          loader.load(p.dreads, token, loader.is_live(token), dreads);
          store_row(chunk.put + producer * kPiece, dreads);
        }
      }
      ptx::sync_named(1, S::kThreads);
    }
  } else {
    const int unit = thread / S::kLanes, row = thread % RP, turn = thread % S::kLanes / RP;
    const bool has_bias = turn == S::kTurns - 1;
    float x[S::kVectors][RP];
#pragma unroll
    for (int v = 0; v < S::kVectors; ++v) {
      const int unit_vector = kOneMap ? (v == 0 ? row : RP) : turn * S::kVectors + v;
#pragma unroll
      for (int j = 0; j < RP; ++j) x[v][j] = j == unit_vector ? 1.0f : 0.0f;
    }
    const int count = shared.segments[unit].count;
    for (int c = 0; c < chunks; ++c) {
      ptx::sync_named(1, S::kThreads);
      const int left = count - c * S::kChunk;
      map_tokens<S, kReverse>(shared.chunk(c), left < S::kChunk ? left : S::kChunk, unit * RP, row, has_bias,
                              x);
    }
    ptx::sync_named(1, S::kThreads);  // all have done with the tokens
    float* map = shared.map(kReverse ? segments.count - 1 - unit : unit);
#pragma unroll
    for (int v = 0; v < S::kVectors; ++v) {
      const int unit_vector = kOneMap ? (v == 0 ? row : RP) : turn * S::kVectors + v;
      if (unit >= segments.count) continue;
      if (v == S::kVectors - 1 && has_bias) {
        store_row(map + S::kMatrices * S::kMatrixPitch + row * RP, x[v]);
      } else if (unit_vector < RP) {
        store_row(map + (kOneMap ? 0 : row) * S::kMatrixPitch + unit_vector * RP, x[v]);
      }
    }
  }
  ptx::sync_block();

  Composer<S> composer(thread);
  for (int i = 0; i < segments.count && composer.active; ++i) {
    const int slot = tree.segment_slot + segments.nth<kReverse>(i);
    composer.pass(shared.map(i), i == 0, p.segment_maps + Tree::place(p, slot, group.head, S::kSize));
  }
  const int supergroup = group.index / kSupergroup;
  const Members groups = members_of(supergroup, kSupergroup, tree.groups);
  uint32_t* of_supergroup = p.counters + Tree::place(p, tree.supergroup_slot + supergroup, group.head, 1);
  if (!arrive_last(of_supergroup, groups.count, shared.arrived)) return;
  compose_groups<S, kReverse>(p, tree, supergroup, group.head, shared);
  uint32_t* of_sequence = p.counters + Tree::place(p, p.plan.slots[2] + group.row, group.head, 1);
  if (!arrive_last(of_sequence, tree.supergroups, shared.arrived)) return;
  carry_supergroups<S, kReverse>(p, tree, group, shared);
}

// Row `row` of the state where segment x begins (reverse: of its gradient where x ends).
template <int RP, bool kReverse>
DELTAMEM_DEVICE void carry_to_segment(const ScanArgs& p, const Segment& x, int row, float (&s)[RP]) {
  const Tree tree(p, x);
  const int matrices = p.plan.one_map ? 1 : RP, size = (matrices + 1) * RP * RP;
  const int matrix = (p.plan.one_map ? 0 : row) * RP * RP, bias = (matrices * RP + row) * RP;
  const int group = x.index / p.plan.group, supergroup = group / kSupergroup;
  const int before = kReverse ? x.index + 1 : x.index - 1, group_before = kReverse ? group + 1 : group - 1;
  load_row(p.starts + Tree::place(p, tree.supergroup_slot + supergroup, x.head, RP * RP) + row * RP, s);
  if (0 <= group_before && group_before < tree.groups && group_before / kSupergroup == supergroup) {
    const float* map = p.group_maps + Tree::place(p, tree.group_slot + group_before, x.head, size);
    apply_map(s, map + matrix, map + bias);
  }
  if (0 <= before && before < tree.segments && before / p.plan.group == group) {
    const float* map = p.segment_maps + Tree::place(p, tree.segment_slot + before, x.head, size);
    apply_map(s, map + matrix, map + bias);
  }
}

template <int RP, bool kOneMap, bool kReverse>
void launch_maps_of(Call& call, ScanArgs& p) {
  using S = MapShape<RP, kOneMap>;
  const int64_t H = p.plan.heads, supergroups = p.plan.slots[2] * H;
  p.segment_maps = call.allocate_array<float>(p.plan.slots[0] * H * S::kSize);
  p.group_maps = call.allocate_array<float>(p.plan.slots[1] * H * S::kSize);
  p.starts = call.allocate_array<float>(supergroups * RP * RP);
  p.counters = call.counters(supergroups + p.plan.rows * H);
  launch<maps_kernel<RP, kOneMap, kReverse>>(
      call,
      {.blocks = p.plan.slots[1] * H, .threads = S::kThreads, .shared_bytes = MapMemory<S>(Carver()).bytes},
      p);
}

// Leaves in p what carry_to_segment takes.
template <bool kReverse>
void launch_maps(Call& call, ScanArgs& p) {
  const bool one = p.plan.one_map;
  if (p.plan.group == group_of(8)) {
    one ? launch_maps_of<8, true, kReverse>(call, p) : launch_maps_of<8, false, kReverse>(call, p);
  } else {
    one ? launch_maps_of<16, true, kReverse>(call, p) : launch_maps_of<16, false, kReverse>(call, p);
  }
}

}  // namespace deltamem::cuda

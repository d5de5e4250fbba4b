// How a scan is cut, decided on the host from shapes alone: nothing here looks at lengths or at the device,
// so a row's bits are the same on every chip and beside any neighbours.
//
//     token -> segment of segment_len tokens -> group of segments -> supergroup of kSupergroup groups
//
// A row of the state passes a segment as an affine map, so segments run in parallel:
//     maps     every segment's map, then in fixed order the products within each group, supergroup and
//     sequence replay   every segment from its true start state
// Where rows alone fill the machine, or sequences are short, a segment is a whole sequence and needs no map.
#pragma once

#include "delta_rule.h"
#include "rows.h"

namespace deltamem::cuda {

inline constexpr int kSupergroup = 16;  // groups

// Tokens of a sequence up to which one lane per row is as fast: a token takes it about 50 cycles, and the
// maps cost a launch and three rounds of products, some 5 us.
inline constexpr int kSequentialSegments = 4;

// A map costs (R + 1) / 2 replays. It pays while the rows alone leave lanes idle: one state's replay keeps R
// of an H200's 16896 lanes busy.
inline constexpr int64_t kIdleStates8 = 256, kIdleStates16 = 64;
// Tokens a sequence, in the mean: above, a packed batch is not drafts alone but has a prompt among them.
inline constexpr int64_t kPackedTokens = 8;

// Segments that give every scheduler of an H200 (528) work; shorter ones only add maps.
inline constexpr int64_t kBusySegments = 1024;
inline constexpr int kShortestSegment = 16;
inline constexpr int64_t kPoolSegment = 64;  // where no tape says

// R, padded to what kernels are made for.
inline int padded_rank(int64_t R) { return R <= 8 ? 8 : R <= 16 ? 16 : R <= 32 ? 32 : 64; }
inline constexpr int group_of(int padded_rank) { return padded_rank == 8 ? 8 : 4; }

// Counts of tokens and slots are 32 bits wide: a 64-bit division is a routine of a hundred instructions.
struct ScanPlan {
  int rows = 0, tokens = 0, heads = 0, rank = 0;  // sequences, T, H, R
  int segment_len = 0;                            // L
  int group = 0;
  bool mapped = false;   // segments start from maps
  bool one_map = false;  // rows share their gates, hence their map
  int slots[3] = {};     // segments, groups, supergroups of all rows

  // Where the segments of a sequence that begins at token `start` stand among those of all rows; the tape's
  // rule, for segments of any length.
  DELTAMEM_HD int first_slot(const Rows& r, int row, int start, int length) const {
    return r.cu_seqlens ? start / length + row : row * per_row(length);
  }
  DELTAMEM_HD int per_row(int length) const { return tokens <= length ? 1 : (tokens - 1) / length + 1; }
  // Tokens, or as many as no sequence has.
  DELTAMEM_HD int group_len() const { return longer(segment_len, group); }
  DELTAMEM_HD int supergroup_len() const { return longer(group_len(), kSupergroup); }
  DELTAMEM_HD int longer(int length, int times) const {
    return length > tokens / times ? tokens + 1 : length * times;
  }
  int count_slots(const Rows& r, int length) const {
    return r.cu_seqlens ? tokens / length + (rows > 1 ? rows : 1) : rows * per_row(length);
  }
};

inline bool share_gates(const Memory& m) {
  const int64_t R = m.mem_q.size[3];
  return R > 1 && m.beta && m.beta.size[3] == 1 && (!m.lam || m.lam.size[3] == 1);
}

// whole: every sequence in one piece. reverse: segments are those of the tape.
inline ScanPlan plan_scan(const Memory& m, const Rows& rows, int64_t segment_len, bool whole, bool reverse) {
  ScanPlan plan;
  const int padded = padded_rank(m.mem_q.size[3]);
  plan.rows = static_cast<int>(num_rows(rows, m.mem_q.size[0]));
  plan.tokens = static_cast<int>(m.mem_q.size[1]);
  plan.heads = static_cast<int>(m.mem_q.size[2]);
  plan.rank = static_cast<int>(m.mem_q.size[3]);
  plan.group = group_of(padded);
  plan.one_map = share_gates(m);
  const int64_t states = int64_t{plan.rows} * plan.heads, T = plan.tokens;
  int64_t L = segment_len;
  bool parallel = T > L;  // read-only segments know their state
  if (m.write) {
    const bool idle = rows.cu_seqlens ? T > int64_t{plan.rows} * kPackedTokens
                                      : states < (padded == 8 ? kIdleStates8 : kIdleStates16);
    parallel = padded <= 16 && idle && T > kSequentialSegments * L;
    plan.mapped = parallel && !whole;
    while (!reverse && L % 2 == 0 && L > kShortestSegment && T / L < kBusySegments) L /= 2;
  }
  plan.segment_len = static_cast<int>(whole || !parallel ? T + 1 : L);
  plan.slots[0] = plan.count_slots(rows, plan.segment_len);
  plan.slots[1] = plan.count_slots(rows, plan.group_len());
  plan.slots[2] = plan.count_slots(rows, plan.supergroup_len());
  return plan;
}

}  // namespace deltamem::cuda

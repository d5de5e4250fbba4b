// The words of a warp: what they compute, given what each lane brought.
#include "numbers.h"
#include "threads.h"

namespace deltamem::emulation {

namespace {

using Lanes = Meeting* const (&)[kWarp];
using Eight = float __attribute__((vector_size(32)));

uint16_t half(uint32_t x, int upper) { return static_cast<uint16_t>(x >> 16 * upper); }

void shuffle(Lanes lanes) {
  uint32_t given[kWarp];
  for (int i = 0; i < kWarp; ++i) given[i] = lanes[i]->value;
  for (int i = 0; i < kWarp; ++i) lanes[i]->value = given[lanes[i]->source_lane];
}

void ballot(Lanes lanes) {
  uint32_t votes = 0;
  for (int i = 0; i < kWarp; ++i) votes |= lanes[i]->value << i;
  for (int i = 0; i < kWarp; ++i) lanes[i]->value = votes;
}

void ldmatrix(Lanes lanes) {
  for (int i = 0; i < kWarp; ++i) {
    for (int j = 0; j < 4; ++j) lanes[i]->fragment[j] = lanes[8 * j + i / 4]->row[i % 4];
  }
}

// [lane / 4] of rows 2 * (lane % 4) + {0, 1}
void ldmatrix_transposed(Lanes lanes) {
  for (int i = 0; i < kWarp; ++i) {
    const int column = i / 4, row = 2 * (i % 4);
    for (int j = 0; j < 4; ++j) {
      const uint32_t low = half(lanes[8 * j + row]->row[column / 2], column % 2);
      const uint32_t high = half(lanes[8 * j + row + 1]->row[column / 2], column % 2);
      lanes[i]->fragment[j] = low | high << 16;
    }
  }
}

void movmatrix(Lanes lanes) {
  uint32_t given[kWarp];
  for (int i = 0; i < kWarp; ++i) given[i] = lanes[i]->value;
  for (int i = 0; i < kWarp; ++i) {
    const int column = i / 4, row = 2 * (i % 4);
    const uint32_t low = half(given[4 * row + column / 2], column % 2);
    const uint32_t high = half(given[4 * (row + 1) + column / 2], column % 2);
    lanes[i]->value = low | high << 16;
  }
}

// Fragments as ptx.cuh draws them. Sums in fp32, in the order of k; the device's order is not known.
template <float (*kValue)(uint16_t)>
void mma(Lanes lanes) {
  float a[16][16];
  float b[16][8];
  float d[16][8];
  for (int i = 0; i < kWarp; ++i) {
    const int g = i / 4, c = 2 * (i % 4);
    const Meeting& lane = *lanes[i];
    for (int j = 0; j < 2; ++j) {
      for (int r = 0; r < 4; ++r) a[g + 8 * (r % 2)][c + 8 * (r / 2) + j] = kValue(half(lane.a[r], j));
      for (int r = 0; r < 2; ++r) b[c + 8 * r + j][g] = kValue(half(lane.b[r], j));
      for (int r = 0; r < 2; ++r) d[g + 8 * r][c + j] = lane.d[2 * r + j];
    }
  }
  for (int m = 0; m < 16; ++m) {
    Eight sum;
    memcpy(&sum, d[m], sizeof(sum));
    for (int k = 0; k < 16; ++k) {
      Eight row;
      memcpy(&row, b[k], sizeof(row));
      sum += a[m][k] * row;
    }
    memcpy(d[m], &sum, sizeof(sum));
  }
  for (int i = 0; i < kWarp; ++i) {
    const int g = i / 4, c = 2 * (i % 4);
    for (int j = 0; j < 2; ++j) {
      for (int r = 0; r < 2; ++r) lanes[i]->d[2 * r + j] = d[g + 8 * r][c + j];
    }
  }
}

}  // namespace

const char* perform(Lanes lanes) {
  switch (lanes[0]->word) {
    case Word::sync_warp:
      return nullptr;
    case Word::shfl:
      for (int i = 0; i < kWarp; ++i) {
        if (lanes[i]->source_lane < 0 || lanes[i]->source_lane >= kWarp) return "shuffles from no lane";
      }
      return shuffle(lanes), nullptr;
    case Word::ballot:
      return ballot(lanes), nullptr;
    case Word::ldmatrix:
      return ldmatrix(lanes), nullptr;
    case Word::ldmatrix_transposed:
      return ldmatrix_transposed(lanes), nullptr;
    case Word::movmatrix:
      return movmatrix(lanes), nullptr;
    case Word::mma_bf16:
      return mma<bf16_value>(lanes), nullptr;
    case Word::mma_f16:
      return mma<f16_value>(lanes), nullptr;
  }
  return "is no word";
}

const char* name_of(Word word) {
  static const char* const names[] = {"sync_warp",           "shfl",      "ballot",    "ldmatrix",
                                      "ldmatrix_transposed", "movmatrix", "mma<bf16>", "mma<f16>"};
  return names[static_cast<int>(word)];
}

}  // namespace deltamem::emulation

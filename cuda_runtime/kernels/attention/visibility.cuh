// Which tokens a query sees.
#pragma once

#include "attention/arguments.cuh"
#include "attention/queries.cuh"
#include "attention/units.cuh"
#include "types.cuh"

namespace dak::attention {

// Tokens [begin, end).
struct Range {
  int begin;
  int end;
};

// For the two rows of a thread: `row` and the one 8 below it.
struct Visibility {
  Range rows[2];
  Range all;  // what every query of the unit sees

  // `length` of the sequence; `span` of the unit on the line.
  __device__ __forceinline__ Visibility(const Arguments& arguments, const QueryRows& queries,
                                        const Span& span, int length, u32 row) {
    const int last = static_cast<int>(arguments.queries) - 1;
    all = range(arguments, span, length, 0);
    all.begin = range(arguments, span, length, last).begin;
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
      const u32 position = (queries.first + row + 8 * i) / arguments.ratio;
      rows[i] = range(arguments, span, length, min(static_cast<int>(position), last));
    }
  }

  // Whether a tile of `tokens` from `first` on needs no mask.
  __device__ __forceinline__ bool whole(int first, int tokens) const {
    return first >= all.begin && first + tokens <= all.end;
  }

 private:
  static __device__ __forceinline__ Range range(const Arguments& arguments, const Span& span,
                                                int length, int query) {
    // the last token of the query's own
    const int own = length - static_cast<int>(arguments.queries) + query;
    Range seen{span.begin, span.end};
    if (arguments.causal) seen.end = min(seen.end, own + 1);
    if (arguments.visible > 0) {
      const int back = static_cast<int>(min(arguments.visible, arguments.tokens + arguments.queries));
      seen.begin = max(seen.begin, own - back + 1);
    }
    return seen;
  }
};

}  // namespace dak::attention

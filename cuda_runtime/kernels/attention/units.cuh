// Units of work: the tokens of one sequence for one head of keys and values, and where their bytes
// lie.
//
// A unit has tiles on two lines. The boundary is its first token of which not all keys and values of
// the head are local. Local tiles are laid from the boundary backwards and remote ones from it
// forwards, so that none has tokens of both kinds; the outermost ones may have fewer tokens.
#pragma once

#include "attention/arguments.cuh"
#include "schedule/tapered_line.cuh"
#include "types.cuh"

namespace dak::attention {

constexpr u32 element_bytes = 2;
constexpr u32 maximum_batch = 512;
constexpr u32 atom_rows = 8;  // of the swizzle: copies begin there
constexpr u64 all_local = ~u64{0};

// Tokens of a sequence that are read, and the tiles of the sequences before it.
struct Sequence {
  int begin;
  int end;
  u32 before[2];  // local, remote
};

// How the work is divided, the same in all CTAs.
struct Division {
  u64 splits[2];  // bytes of the key and value buffers that are local
  schedule::TaperedLine lines[2];  // local, remote
  u32 remote_workers;  // they have a run of the remote line, the other workers one of the local line
  u32 quota;           // bytes that each of them may have in flight
};

// Tokens of a unit on one line, and the tiles that hold them.
struct Span {
  int begin;
  int end;
  u32 tiles;
};

// What is local of one head's keys or values: so many whole tokens, and bytes of the next one.
struct Edge {
  u32 tokens;
  u32 bytes;
};

// Where a unit begins on the lines.
struct Place {
  u32 begin[2];  // local, remote
};

// What a sequence adds to the lines, all heads.
struct Count {
  u32 tiles[2];  // local, remote
  u32 remote_units;
  u32 remote_tokens;
  u32 longest_remote;  // tokens of one head
};

// Rows of a slot that copies fill.
struct Rows {
  u32 begin;
  u32 end;
};

// `tile`: tokens of a tile. `row_bytes`: of one token of one head.
template <u32 tile, u32 row_bytes>
class Units {
 public:
  __device__ __forceinline__ Units(const Arguments& arguments, const Division& division,
                                   const Sequence* sequences)
      : arguments_(arguments), division_(division), sequences_(sequences) {}

  // Heads times the parts that their queries are cut into.
  __device__ __forceinline__ u32 heads() const { return arguments_.heads * arguments_.row_blocks; }

  __device__ __forceinline__ const Sequence& sequence(u32 index) const { return sequences_[index]; }

  // Tokens of a sequence that some query sees.
  __device__ __forceinline__ Sequence range(int length, int start) const {
    const int end = max(0, min(length, static_cast<int>(arguments_.tokens)));
    int begin = max(start, 0);
    if (arguments_.visible > 0) {
      const int back = static_cast<int>(arguments_.queries) - 1;
      begin = max(begin, end - back - static_cast<int>(min(arguments_.visible, arguments_.tokens)));
    }
    return {min(begin, end), end, {0, 0}};
  }

  // Of keys (0) or values (1) of a head.
  __device__ __forceinline__ Edge edge(u32 side, u32 sequence, u32 head) const {
    const Cache& cache = arguments_.caches[side];
    const u64 first = cache.offset + sequence * cache.batch_bytes +
                      arguments_.blocks.quotient(head) * cache.head_bytes;
    const u64 split = division_.splits[side];
    const u64 local = split > first ? split - first : 0;
    if (local >= arguments_.tokens * cache.token_bytes) return {arguments_.tokens, 0};
    constexpr u32 grain = 16;
    const u32 grains = static_cast<u32>(local / grain);
    const u32 whole = cache.token_grains.quotient(grains);
    const u32 rest = grains - whole * static_cast<u32>(cache.token_bytes / grain);
    // what follows in the row belongs to other heads
    return rest >= row_bytes / grain ? Edge{whole + 1, 0} : Edge{whole, rest * grain};
  }

  // The first token of a unit that is not all local.
  __device__ __forceinline__ int boundary(u32 sequence, u32 head) const {
    return static_cast<int>(min(edge(0, sequence, head).tokens, edge(1, sequence, head).tokens));
  }

  __device__ __forceinline__ Span span(u32 sequence, int boundary, bool remote) const {
    const Sequence& tokens = sequences_[sequence];
    const int begin = remote ? max(tokens.begin, boundary) : tokens.begin;
    const int end = remote ? tokens.end : min(tokens.end, boundary);
    const u32 count = static_cast<u32>(max(0, end - begin));
    return {begin, end, (count + tile - 1) / tile};
  }

  // The first token of a tile's slot; it may lie before the span.
  static __device__ __forceinline__ int first_token(const Span& span, u32 index, bool remote) {
    if (remote) return span.begin + static_cast<int>(index * tile);
    return span.end - static_cast<int>((span.tiles - index) * tile);
  }

  // The rows of a tile's slot that hold tokens of the span, up to 7 before and, where copies may end
  // at any row, none behind: it takes as long as if it were wanted. Of 1% of 1024 tokens, 10 or 11,
  // copies of 16 would be half as many bytes again over the link.
  __device__ __forceinline__ Rows rows(const Span& span, int first) const {
    const u32 begin = static_cast<u32>(max(0, span.begin - first));
    const u32 end = static_cast<u32>(min(static_cast<int>(tile), span.end - first));
    const u32 finest = arguments_.finest_rows;
    return {begin / atom_rows * atom_rows, (end + finest - 1) & ~(finest - 1)};
  }

  // Bytes of a token range that are local.
  static __device__ __forceinline__ u64 local_bytes(const Edge& edge, int begin, int end) {
    const int whole = static_cast<int>(edge.tokens);
    const u64 tokens = static_cast<u64>(max(0, min(end, whole) - begin));
    const bool cut = begin <= whole && whole < end;
    return tokens * row_bytes + (cut ? edge.bytes : 0);
  }

  // Where a unit begins on both lines.
  __device__ __forceinline__ Place place(u32 sequence, u32 head) const {
    const Sequence& tokens = sequences_[sequence];
    Place place{{tokens.before[0], tokens.before[1]}};
    const int first = boundary(sequence, 0);
    const bool equal = equal_heads(sequence, first);
#pragma unroll 1
    for (u32 i = 0; i < (equal ? 1 : head); ++i) {
      const int at = boundary(sequence, i);
      const u32 heads = equal ? head : 1;
      place.begin[0] += span(sequence, at, false).tiles * heads;
      place.begin[1] += span(sequence, at, true).tiles * heads;
    }
    return place;
  }

  __device__ __forceinline__ Count count(u32 sequence) const {
    Count sum{};
    const Sequence& tokens = sequences_[sequence];
    if (tokens.begin == tokens.end) return sum;
    const int first = boundary(sequence, 0);
    const bool equal = equal_heads(sequence, first);
#pragma unroll 1
    for (u32 i = 0; i < (equal ? 1 : heads()); ++i) {
      const int at = boundary(sequence, i);
      const u32 count = equal ? heads() : 1;
      const Span remote = span(sequence, at, true);
      const u32 length = static_cast<u32>(max(0, remote.end - remote.begin));
      sum.tiles[0] += span(sequence, at, false).tiles * count;
      sum.tiles[1] += remote.tiles * count;
      sum.remote_units += length > 0 ? count : 0;
      sum.remote_tokens += length * count;
      sum.longest_remote = max(sum.longest_remote, length);
    }
    return sum;
  }

  // Whether all heads of a sequence have as many tiles as the first one, whose boundary is given: all
  // but where the boundary passes. That of a later head is never later.
  __device__ __forceinline__ bool equal_heads(u32 sequence, int first) const {
    const int last = boundary(sequence, heads() - 1);
    return first == last ||
           (span(sequence, first, false).tiles == span(sequence, last, false).tiles &&
            span(sequence, first, true).tiles == span(sequence, last, true).tiles);
  }

 private:
  const Arguments& arguments_;
  const Division& division_;
  const Sequence* const sequences_;
};

}  // namespace dak::attention

// The attention kernel's division of work as functions for attention_division.py.
#include <algorithm>
#define __device__
#define __forceinline__ inline
#define __fdividef(a, b) (static_cast<float>(a) / static_cast<float>(b))
#define __clz(a) __builtin_clz(a)
#define __umulhi(a, b) static_cast<unsigned>(static_cast<unsigned long long>(a) * (b) >> 32)
using std::max;
using std::min;
#include "attention/division.cuh"
#include "attention/slots.cuh"
#include "attention/task.cuh"
#include "attention/units.cuh"
#include "attention/walk.cuh"

using namespace dak;
using namespace dak::attention;

constexpr u32 tile = TILE, row_bytes = ROW_BYTES;

struct Found {
  u32 worker, remote, sequence, head, slot, slots, first_slot, last_slot;
  int begin, end;  // tokens
  u32 rows_begin, rows_end, opens_piece;
  u32 resumes, complete;  // of the piece
  u64 local_bytes[2];
};

struct Sizes {
  u32 batch, heads, row_blocks, queries, tokens, visible, workers, slots, window;
  u32 most_chunks, least_chunk, sweep, finest_rows;
  float remote_tile, remote_piece;
  u32 blocks[2], grains[2];  // divisors
  u64 splits[2], offsets[2], batch_bytes, head_bytes, token_bytes;
};

extern "C" u32 quotient(u32 multiplier, u32 shift, u32 value) {
  return schedule::Divisor{multiplier, shift}.quotient(value);
}

// Of a unit with so many slots on either line: `first`, `step`, `count`, `all` of the group that a
// slot belongs to and of the groups, and whether there are any.
extern "C" u32 group(const u32* lines, u32 index, u32 most_at_once, u32* members) {
  const Slots slots{{100, 2000}, {lines[0], lines[1]}};
  const u32 shift = slots.group_shift(most_at_once);
  const Members both[2] = {slots.group(slots.at(index), shift), slots.groups(shift)};
  for (const Members& each : both) {
    for (const u32 value : {each.first, each.step, each.count, static_cast<u32>(each.all)}) {
      *members++ = value;
    }
  }
  return shift > 0;
}

// Bit 0: granted, bit 1: the last one.
extern "C" u32 claim(u32 chunks, u32 workers, u32 before) {
  const schedule::Claims claims{chunks, workers};
  return claims.granted(before) + 2 * claims.last(before);
}

// Ends of the parts of a line: of all runs' own ones, then of the chunks in the order of claims;
// `parts` receives their numbers and `part_of` what each position finds.
extern "C" u32 taper(u32 total, u32 workers, float share, u32 most, u32 least, u32* begins,
                     u32* ends, u32* parts, u32* part_of) {
  const schedule::TaperedLine line = schedule::TaperedLine::cut(total, workers, share, most, least);
  u32 count = 0;
  for (u32 run = 0; run < workers; ++run) {
    const schedule::Run own = line.own(run);
    if (own.begin == own.end) continue;
    begins[count] = own.begin;
    ends[count] = own.end;
    parts[count++] = line.own_part(run);
  }
  for (u32 i = 0; i < line.claimable(); ++i) {
    begins[count] = line.chunk(i).begin;
    ends[count] = line.chunk(i).end;
    parts[count++] = line.chunk_part(i);
  }
  for (u32 position = 0; position < total; ++position) part_of[position] = line.part_of(position);
  return count;
}

// Pieces of all workers, then of all chunks in the order of claims, as if each had a worker of its
// own; `totals` receives remote workers, quota, tiles of both lines, parts of both lines.
extern "C" u32 divide_work(const Sizes* sizes, const int* lengths, const int* starts, Found* found,
                           u32 most, u32* totals) {
  Arguments arguments{};
  for (u32 side = 0; side < 2; ++side) {
    arguments.caches[side] = {nullptr, sizes->offsets[side], sizes->batch_bytes,
                              sizes->head_bytes, sizes->token_bytes,
                              {sizes->grains[0], sizes->grains[1]}};
  }
  arguments.batch = sizes->batch;
  arguments.heads = sizes->heads;
  arguments.row_blocks = sizes->row_blocks;
  arguments.blocks = {sizes->blocks[0], sizes->blocks[1]};
  arguments.queries = sizes->queries;
  arguments.tokens = sizes->tokens;
  arguments.visible = sizes->visible;
  arguments.most_chunks = sizes->most_chunks;
  arguments.least_chunk = sizes->least_chunk;
  arguments.remote_tile = sizes->remote_tile;
  arguments.remote_piece = sizes->remote_piece;
  arguments.finest_rows = sizes->finest_rows;
  static Sequence sequences[maximum_batch + 1];
  Division division{};
  division.splits[0] = sizes->splits[0];
  division.splits[1] = sizes->splits[1];
  const Units<tile, row_bytes> units(arguments, division, sequences);
  Count total{};
  for (u32 i = 0; i < sizes->batch; ++i) {
    sequences[i] = units.range(lengths[i], starts[i]);
    const Count count = units.count(i);
    for (u32 line = 0; line < 2; ++line) {
      sequences[i].before[line] = total.tiles[line];
      total.tiles[line] += count.tiles[line];
    }
    total.remote_units += count.remote_units;
    total.remote_tokens += count.remote_tokens;
    total.longest_remote = max(total.longest_remote, count.longest_remote);
  }
  sequences[sizes->batch] = {0, 0, {total.tiles[0], total.tiles[1]}};
  divide(division, arguments, total, sizes->workers, sizes->window, tile, row_bytes, sizes->slots);
  totals[0] = division.remote_workers;
  totals[1] = division.quota;
  totals[2] = total.tiles[0];
  totals[3] = total.tiles[1];
  totals[4] = division.lines[0].parts();
  totals[5] = division.lines[1].parts();
  u32 pieces = 0;
  const u32 chunks = division.lines[0].claimable();
  for (u32 worker = 0; worker < sizes->workers + chunks; ++worker) {
    Walk<tile, row_bytes> walk(units, Rest{}, sizes->sweep);
    if (worker < sizes->workers) {
      walk.enter_first(division, worker, sizes->batch);
      // a worker that has nothing would never claim
      if (walk.done() && chunks > 0) return most + 3;
    } else {
      const u32 before = worker - sizes->workers;
      walk.enter(0, division.lines[0].chunk(before), division.lines[0].chunk_part(before),
                 sizes->batch);
    }
    for (Piece piece = walk.next(); piece.last > piece.first; piece = walk.next()) {
      const bool remote = piece.line == 1;
      const Task task = Task::of_piece(units, division, piece, sizes->batch);
      const Slots& slots = task.slots;
      for (u32 i = piece.first; i < piece.last; ++i) {
        if (pieces == most) return most + 1;
        const int first = units.first_token(piece.span, i, remote);
        if (first != task.first + static_cast<int>((i - piece.first) * tile)) return most + 4;
        const Rows rows = units.rows(piece.span, first);
        Found& tile_found = found[pieces++];
        tile_found = {worker, remote, piece.sequence, piece.head, task.slot, slots.total(),
                      slots.at(0), slots.at(slots.total() - 1),
                      max(first, piece.span.begin),
                      min(first + static_cast<int>(tile), piece.span.end),
                      rows.begin, rows.end, i == piece.first, piece.resumes, piece.complete,
                      {0, 0}};
        for (u32 side = 0; side < 2; ++side) {
          tile_found.local_bytes[side] =
              units.local_bytes(units.edge(side, piece.sequence, piece.head), tile_found.begin,
                                tile_found.end);
        }
        bool member = false;
        for (u32 j = 0; j < slots.total(); ++j) member = member || slots.at(j) == task.slot;
        if (!member) return most + 2;
      }
      if (task.tiles != piece.last - piece.first) return most + 5;
      for (u32 j = 0; j < slots.total(); ++j) {
        if (slots.index(slots.at(j)) != j) return most + 5;
      }
      if (task.resumes != piece.resumes || task.complete != piece.complete) return most + 5;
    }
    if (Task::of_piece(units, division, walk.next(), sizes->batch).tiles != 0) return most + 6;
  }
  return pieces;
}

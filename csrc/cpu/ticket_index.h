// The parts of a ticket's index, and whether they belong together.
#pragma once

#include "gemm.h"
#include "ticket.h"

namespace pyeff {
namespace PYEFF_ISA {

// See pyeff/plans/ticket.py.
struct TicketParts {
  int64_t rows, columns, nnz;
  const int32_t *row_start, *column;         // [rows + 1], [nnz]
  const int32_t *column_start, *row, *slot;  // [columns + 1], [nnz], [nnz]
  const int32_t *row_order, *column_order;   // [rows], [columns]

  explicit TicketParts(const TicketProblem& p)
      : rows(ceil_div(p.out, p.bo)),
        columns(ceil_div(p.in, p.bi)),
        nnz(p.nnz),
        row_start(p.index),
        column(row_start + rows + 1),
        column_start(column + nnz),
        row(column_start + columns + 1),
        slot(row + nnz),
        row_order(slot + nnz),
        column_order(row_order + rows) {}
};

// Whether `start` cuts [0, nnz) into `count` pieces, in each of which `other` ascends within [0, limit).
inline bool ticket_pieces_are_right(const int32_t* start, int64_t count, const int32_t* other, int64_t nnz,
                                    int64_t limit) {
  if (start[0] != 0 || start[count] != nnz) return false;
  for (int64_t i = 0; i < count; ++i)
    if (start[i] > start[i + 1]) return false;
  int64_t bad = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = start[i], end = start[i + 1];
    if (begin == end) continue;
    for (int64_t e = begin + 1; e < end; ++e) bad += other[e - 1] >= other[e];
    // As they ascend, all lie between the first and the last.
    bad += other[begin] < 0 || other[end - 1] >= limit;
    if (bad) return false;
  }
  return true;
}

// Whether `order` holds every index below `count` once, by falling size and, among equals, ascending: that is one
// order.
inline bool ticket_order_is_right(const int32_t* order, int64_t count, const int32_t* start) {
  auto size = [&](int32_t i) { return start[i + 1] - start[i]; };
  for (int64_t i = 0; i < count; ++i) {
    if (order[i] < 0 || order[i] >= count) return false;
    if (i == 0) continue;
    const int32_t before = size(order[i - 1]), here = size(order[i]);
    if (before < here || (before == here && order[i - 1] >= order[i])) return false;
  }
  return true;
}

inline const char* ticket_index_problem(const TicketParts& t) {
  if (!ticket_pieces_are_right(t.row_start, t.rows, t.column, t.nnz, t.columns))
    return "row_start or column is out of range or out of order";
  if (!ticket_pieces_are_right(t.column_start, t.columns, t.row, t.nnz, t.rows))
    return "column_start or row is out of range or out of order";
  // No row and column occur twice in the second list, nor in the first, which is as long: if each entry of the second
  // is one of the first, they are the same blocks.
  int64_t bad = 0;
  for (int64_t c = 0; c < t.columns; ++c)
    for (int64_t e = t.column_start[c]; e < t.column_start[c + 1]; ++e) {
      const int32_t slot = t.slot[e], row = t.row[e];
      if (slot < t.row_start[row] || slot >= t.row_start[row + 1]) return "slot points into another row";
      bad += t.column[slot] != c;
    }
  if (bad) return "slot points into another column";
  if (!ticket_order_is_right(t.row_order, t.rows, t.row_start)) return "row_order is not that of its rows";
  if (!ticket_order_is_right(t.column_order, t.columns, t.column_start))
    return "column_order is not that of its columns";
  return nullptr;
}

}  // namespace PYEFF_ISA
}  // namespace pyeff

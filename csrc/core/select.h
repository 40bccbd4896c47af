/* Selection: which indices go first, within one axis and across many.
 *
 * An axis gives up its indices in the order of their scores, lowest first; equal scores go by index.  Across axes the
 * next step is the one with the lowest key; equal keys go to the axis with the lower number.  Both orders are total, so
 * a plan is a function of the scores alone, the same on every machine.
 *
 * Nothing here keeps a pointer it was given; arrays must not overlap.
 */
#ifndef LP_CORE_SELECT_H
#define LP_CORE_SELECT_H

#include "status.h"

/* order[0..count) = the indices 0..count-1 by ascending score, equal scores (-0.0 equals 0.0) by ascending index.
 * LP_ERR_ARGUMENT for a NaN (infinities are ordinary scores), LP_ERR_NOMEM; `order` is then unspecified. */
lp_status lp_select_rank(const lp_allocator *allocator, const double *scores, size_t count, int64_t *order,
                         lp_error *err);

/* Merge the removal steps of `axes` axes into one sequence.
 *
 * Axis a takes the steps keys[offsets[a]] .. keys[offsets[a + 1] - 1], in that order: a step is open once those before
 * it are taken.  sequence[0..offsets[axes]) receives the axis of each step, always the open step of the lowest key,
 * equal keys to the lower axis.  offsets[0] is 0 and offsets never decrease.
 * LP_ERR_ARGUMENT for a NaN key or unsorted offsets, LP_ERR_OVERFLOW for too many axes, LP_ERR_NOMEM. */
lp_status lp_select_merge(const lp_allocator *allocator, const double *keys, const int64_t *offsets,
                          size_t axes, int64_t *sequence, lp_error *err);

#endif

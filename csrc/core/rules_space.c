/* Rules over space: windows, padding, shuffles between channels and pixels, Fourier transforms. */
#include "rules.h"

/* A pooled, resized or padded input: its last `detail` dimensions are places, the others pass.  A second tensor says
 * where to look (grid_sampler). */
lp_status lp_rule_pool(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *input = lp_op_tensor(run->graph, op, 0), *out = lp_op_output(run->graph, op, 0);
    lp_tensor *grid = lp_op_tensor(run->graph, op, 1);
    lp_expr dims[LP_MAX_DIMS] = {{0, 0}};

    if (input == NULL || out == NULL || input->ndim < op->detail || out->ndim != input->ndim)
        return lp_rule_unknown(run, op, err);
    for (size_t d = 0; d < input->ndim; d++) {
        dims[d] = input->dims[d];
        if (d + op->detail < input->ndim)
            continue;
        LP_TRY(lp_axes_note(run->axes, input->dims[d], LP_REASON_SPATIAL, err));
        LP_TRY(lp_axes_fresh(run->axes, out->sizes[d], &dims[d], err));
        LP_TRY(lp_axes_note(run->axes, dims[d], LP_REASON_SPATIAL, err));
    }
    for (size_t d = 0; grid != NULL && d < grid->ndim; d++) {
        if (d == 0 && grid->sizes[0] == input->sizes[0])
            LP_TRY(lp_unify_dims(run, input->dims[0], grid->dims[0], LP_RULE_EQUAL, err));
        else
            LP_TRY(lp_axes_note(run->axes, grid->dims[d], LP_REASON_SPATIAL, err));
    }
    for (size_t i = 0; i < op->output_count; i++)
        LP_TRY(lp_set_output(run, op, i, dims, err));
    return LP_OK;
}

/* im2col: (N, C, H, W) -> (N, C x window, places), col2im the other way; pixel_unshuffle: (N, C, H, W) ->
 * (N, C x r x r, H / r, W / r), pixel_shuffle the other way.  In all four the channels are the outer factor of the
 * dimension they share, and everything behind the channels is a place. */
lp_status lp_rule_shuffle(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *input = lp_op_tensor(run->graph, op, 0), *out = lp_op_output(run->graph, op, 0);
    size_t places = op->detail; /* dimensions behind the channels in the input */
    size_t channel, behind;
    lp_expr dims[LP_MAX_DIMS] = {{0, 0}}, pair[2];
    int64_t from, to, sizes[2];
    bool aligned;

    if (input == NULL || out == NULL || input->ndim <= places)
        return lp_rule_unknown(run, op, err);
    channel = input->ndim - places - 1;
    if (out->ndim <= channel)
        return lp_rule_unknown(run, op, err);
    behind = out->ndim - channel - 1;
    from = input->sizes[channel], to = out->sizes[channel];
    for (size_t d = 0; d < channel; d++)
        dims[d] = input->dims[d];
    for (size_t d = channel + 1; d < input->ndim; d++)
        LP_TRY(lp_axes_note(run->axes, input->dims[d], LP_REASON_SPATIAL, err));
    for (size_t d = channel + 1; d < channel + 1 + behind; d++) {
        LP_TRY(lp_axes_fresh(run->axes, out->sizes[d], &dims[d], err));
        LP_TRY(lp_axes_note(run->axes, dims[d], LP_REASON_SPATIAL, err));
    }
    if (from == 0 || to == 0 || (to >= from ? to % from : from % to) != 0)
        return lp_rule_unknown(run, op, err);
    if (to >= from) {
        LP_TRY(lp_axes_fresh(run->axes, to / from, &pair[1], err));
        LP_TRY(lp_axes_note(run->axes, pair[1], LP_REASON_SPATIAL, err));
        LP_TRY(lp_axes_concat(run->axes, input->dims[channel], pair[1], &dims[channel], err));
    } else {
        sizes[0] = to, sizes[1] = from / to;
        LP_TRY(lp_axes_split(run->axes, input->dims[channel], sizes, 2, pair, &aligned, err));
        if (!aligned)
            return lp_rule_unknown(run, op, err);
        LP_TRY(lp_axes_note(run->axes, pair[1], LP_REASON_SPATIAL, err));
        dims[channel] = pair[0];
    }
    return lp_set_output(run, op, 0, dims, err);
}

/* _fft_c2c, _fft_r2c, _fft_c2r: along the given dimensions everything mixes with everything. */
lp_status lp_rule_fourier(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *input = lp_op_tensor(run->graph, op, 0), *out = lp_op_output(run->graph, op, 0);
    lp_arg which = lp_op_arg(run->graph, op, 1);
    lp_expr dims[LP_MAX_DIMS] = {{0, 0}};

    if (input == NULL || out == NULL || out->ndim != input->ndim)
        return lp_rule_unknown(run, op, err);
    for (size_t i = 0; i < which.count; i++)
        LP_TRY(lp_axes_note(run->axes, input->dims[lp_wrap_dim(which.values[i], input->ndim)],
                            LP_REASON_ORDER, err));
    for (size_t d = 0; d < input->ndim; d++) {
        dims[d] = input->dims[d];
        if (out->sizes[d] == input->sizes[d])
            continue;
        LP_TRY(lp_axes_fresh(run->axes, out->sizes[d], &dims[d], err));
        LP_TRY(lp_axes_note(run->axes, dims[d], LP_REASON_ORDER, err));
    }
    return lp_set_output(run, op, 0, dims, err);
}

#include "graph.h"

const char *lp_kind_name(lp_kind kind)
{
    switch (kind) {
    case LP_KIND_OTHER:
        return "other";
    case LP_KIND_HEAD:
        return "head";
    case LP_KIND_QUERY:
        return "query";
    case LP_KIND_FFN:
        return "ffn";
    case LP_KIND_CHANNEL:
        return "channel";
    case LP_KIND_EXPERT:
        return "expert";
    case LP_KIND_HEAD_DIM:
        return "head_dim";
    case LP_KIND_VALUE_DIM:
        return "value_dim";
    case LP_KIND_RANK:
        return "rank";
    case LP_KIND_STATE:
        return "state";
    }
    return "other";
}

const char *lp_rule_label(lp_rule rule)
{
    switch (rule) {
    case LP_RULE_NONE:
        return "none";
    case LP_RULE_FORWARD:
        return "forward";
    case LP_RULE_BACKWARD:
        return "backward";
    case LP_RULE_EQUAL:
        return "equal shape";
    case LP_RULE_VALUE:
        return "index value";
    case LP_RULE_PART:
        return "part";
    }
    return "none";
}

const char *lp_reason_text(lp_reason reason)
{
    switch (reason) {
    case LP_REASON_NONE:
    case LP_REASON_COUNT:
        break;
    case LP_REASON_INPUT:
        return "a dimension of the model's inputs";
    case LP_REASON_OUTPUT:
        return "a dimension of the model's outputs";
    case LP_REASON_CONSTANT:
        return "a constant the forward pass brings along";
    case LP_REASON_POSITION:
        return "values that are positions (arange)";
    case LP_REASON_INDEXED:
        return "addressed by data";
    case LP_REASON_SPATIAL:
        return "a spatial or kernel dimension";
    case LP_REASON_SELECT:
        return "picked from by a constant index";
    case LP_REASON_COMPLEX:
        return "the pair of a complex number";
    case LP_REASON_SLOTS:
        return "the slots of a top-k choice";
    case LP_REASON_PADDING:
        return "padding of a fixed width";
    case LP_REASON_UNKNOWN_OP:
        return "an operation without a rule touches it";
    case LP_REASON_MISALIGNED:
        return "dimensions that do not align meet here";
    case LP_REASON_ORDER:
        return "the order along it matters";
    case LP_REASON_VALUE:
        return "its size is used as a number";
    case LP_REASON_RANDOM:
        return "random numbers are drawn along it";
    case LP_REASON_UNUSED:
        return "nothing the outputs depend on uses it";
    case LP_REASON_FIXED:
        return "its size is fixed in the model's code";
    case LP_REASON_TRIAL:
        return "a trial forward without one index failed";
    case LP_REASON_GROUPED:
        return "normalised within groups of a fixed size";
    case LP_REASON_SCALE:
        return "attention is scaled by its size";
    case LP_REASON_DECLARED:
        return "the rule registered for the operation freezes it";
    case LP_REASON_NUMBERED:
        return "numbers of its positions are compared or computed with";
    case LP_REASON_REMAINS:
        return "summed over where zero weights do not make it zero";
    case LP_REASON_EMPTY:
        return "these inputs left an operation on it empty";
    case LP_MARK_MEAN:
        return "a mean is taken over it";
    case LP_MARK_EXTREME:
        return "a maximum or minimum is taken over it";
    case LP_MARK_SOFTMAX:
        return "a softmax runs over it";
    case LP_MARK_NORM:
        return "a normalisation runs over it";
    case LP_MARK_TOPK:
        return "a top-k choice is made from it";
    case LP_MARK_REMAINS:
        return "a mean over it is of values that zero weights do not make zero";
    }
    return "no reason";
}

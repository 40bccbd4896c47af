/* Every question graph.h answers, put to a graph at once: for tapes nobody has written by hand. */
#ifndef LP_TESTS_CORE_QUESTIONS_H
#define LP_TESTS_CORE_QUESTIONS_H

#include "tape.h"

/* Ask a built graph everything, with one index of each axis gone and with none, and freeze every axis at last.  Leaves the
 * first failure in t->status; an answer that cannot be true becomes LP_ERR_INTERNAL. */
void tape_ask_everything(tape *t);

#endif

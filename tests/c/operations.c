/* SPDX-License-Identifier: MIT
 *
 * The operations of ssmk.h called from C99: each on small data, compared with the formula as plain
 * loops.  Prints one line an operation; exits with 1 if a number is wrong.
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <ssmk.h>

static int failures = 0;

/* Numbers in [-1, 1], the same everywhere. */
static uint32_t seed = 1;
static float next(void) {
  seed = seed * 1664525u + 1013904223u;
  return (float)(seed >> 8) / 8388608.0f - 1.0f;
}
static void fill(float *values, int count) {
  for (int i = 0; i < count; ++i) values[i] = next();
}

static double softplus(double x) { return x > 20 ? x : log1p(exp(x)); }
static double silu(double x) { return x / (1 + exp(-x)); }

typedef struct Tensor {
  DLTensor t;
  int64_t shape[5];
} Tensor;

/* A compact tensor on the CPU. */
static DLTensor *tensor(Tensor *to, void *data, uint8_t code, uint8_t bits, int ndim,
                        const int64_t *shape) {
  memset(to, 0, sizeof *to);
  memcpy(to->shape, shape, (size_t)ndim * sizeof *shape);
  to->t.data = data;
  to->t.device.device_type = kDLCPU;
  to->t.ndim = ndim;
  to->t.dtype.code = code;
  to->t.dtype.bits = bits;
  to->t.dtype.lanes = 1;
  to->t.shape = to->shape;
  return &to->t;
}
#define SIZES(...) ((const int64_t[]){__VA_ARGS__})
#define FLOATS(to, data, ndim, ...) tensor(to, data, kDLFloat, 32, ndim, SIZES(__VA_ARGS__))
#define INDICES(to, data, ndim, ...) tensor(to, data, kDLInt, 64, ndim, SIZES(__VA_ARGS__))

static void compare(const char *what, const float *got, const double *want, int count) {
  double largest = 0, error = 0;
  for (int i = 0; i < count; ++i) {
    const double difference = fabs(got[i] - want[i]);
    if (fabs(want[i]) > largest) largest = fabs(want[i]);
    if (!(difference <= error)) error = difference == difference ? difference : HUGE_VAL; /* NaN */
  }
  const int good = error <= 2e-5 * largest;
  printf("%-40s %s (error %.1e of the largest value)\n", what, good ? "ok" : "WRONG",
         error / largest);
  failures += !good;
}

static int succeeded(const char *what, ssmk_status status) {
  if (status == SSMK_OK) return 1;
  printf("%-40s %s: %s\n", what, ssmk_status_name(status), ssmk_last_error());
  ++failures;
  return 0;
}

enum { BATCH = 2, DIM = 6, SEQLEN = 9, GROUPS = 2, DSTATE = 5 };

static void selective_scan(void) {
  static float x[BATCH][DIM][SEQLEN], dt[BATCH][DIM][SEQLEN], z[BATCH][DIM][SEQLEN];
  static float A[DIM][DSTATE], D[DIM], bias[DIM], out[BATCH][DIM][SEQLEN];
  static float B[BATCH][GROUPS][DSTATE][SEQLEN], C[BATCH][GROUPS][DSTATE][SEQLEN];
  static float final[BATCH][DIM][DSTATE];
  static double want[BATCH][DIM][SEQLEN], state[BATCH][DIM][DSTATE];
  fill(&x[0][0][0], BATCH * DIM * SEQLEN);
  fill(&dt[0][0][0], BATCH * DIM * SEQLEN);
  fill(&z[0][0][0], BATCH * DIM * SEQLEN);
  fill(&B[0][0][0][0], BATCH * GROUPS * DSTATE * SEQLEN);
  fill(&C[0][0][0][0], BATCH * GROUPS * DSTATE * SEQLEN);
  fill(D, DIM);
  fill(bias, DIM);
  for (int i = 0; i < DIM * DSTATE; ++i) (&A[0][0])[i] = -1.0f - next() / 2;

  for (int b = 0; b < BATCH; ++b)
    for (int d = 0; d < DIM; ++d)
      for (int t = 0; t < SEQLEN; ++t) {
        const double step = softplus((double)dt[b][d][t] + bias[d]);
        double y = (double)D[d] * x[b][d][t];
        for (int n = 0; n < DSTATE; ++n) {
          const int g = d / (DIM / GROUPS);
          state[b][d][n] = exp(step * A[d][n]) * state[b][d][n] + step * x[b][d][t] * B[b][g][n][t];
          y += state[b][d][n] * C[b][g][n][t];
        }
        want[b][d][t] = y * silu(z[b][d][t]);
      }

  Tensor tx, tdt, tA, tB, tC, tD, tz, tbias, tout, tfinal;
  ssmk_selective_scan_args args = {
      .size = sizeof args,
      .x = FLOATS(&tx, x, 3, BATCH, DIM, SEQLEN),
      .dt = FLOATS(&tdt, dt, 3, BATCH, DIM, SEQLEN),
      .A = FLOATS(&tA, A, 2, DIM, DSTATE),
      .B = FLOATS(&tB, B, 4, BATCH, GROUPS, DSTATE, SEQLEN),
      .C = FLOATS(&tC, C, 4, BATCH, GROUPS, DSTATE, SEQLEN),
      .D = FLOATS(&tD, D, 1, DIM),
      .z = FLOATS(&tz, z, 3, BATCH, DIM, SEQLEN),
      .dt_bias = FLOATS(&tbias, bias, 1, DIM),
      .out = FLOATS(&tout, out, 3, BATCH, DIM, SEQLEN),
      .final_states = FLOATS(&tfinal, final, 3, BATCH, DIM, DSTATE),
      .dt_softplus = 1,
  };
  uint64_t scratch = 1;
  const ssmk_status asked = ssmk_selective_scan_workspace(&args, &scratch);
  if (!succeeded("selective_scan_workspace", asked)) return;
  if (scratch > 0) {
    printf("selective_scan wants a workspace of %lu bytes\n", (unsigned long)scratch);
    ++failures;
  }
  if (!succeeded("selective_scan", ssmk_selective_scan(&args))) return;
  compare("selective_scan: out", &out[0][0][0], &want[0][0][0], BATCH * DIM * SEQLEN);
  compare("selective_scan: final_states", &final[0][0][0], &state[0][0][0], BATCH * DIM * DSTATE);
}

enum { HEADS = 4, HEADDIM = 3, ENTRIES = 5 };

static void state_update(void) {
  static float pool[ENTRIES][HEADS][HEADDIM][DSTATE];
  static float x[BATCH][HEADS][HEADDIM], out[BATCH][HEADS][HEADDIM], dt[BATCH][HEADS];
  static float A[HEADS], D[HEADS], B[BATCH][GROUPS][DSTATE], C[BATCH][GROUPS][DSTATE];
  static double want[BATCH][HEADS][HEADDIM], state[ENTRIES][HEADS][HEADDIM][DSTATE];
  static int64_t slots[BATCH] = {3, 0};
  fill(&pool[0][0][0][0], ENTRIES * HEADS * HEADDIM * DSTATE);
  fill(&x[0][0][0], BATCH * HEADS * HEADDIM);
  fill(&dt[0][0], BATCH * HEADS);
  fill(&B[0][0][0], BATCH * GROUPS * DSTATE);
  fill(&C[0][0][0], BATCH * GROUPS * DSTATE);
  fill(D, HEADS);
  for (int h = 0; h < HEADS; ++h) A[h] = -1.0f - next() / 2;
  for (int i = 0; i < ENTRIES * HEADS * HEADDIM * DSTATE; ++i)
    (&state[0][0][0][0])[i] = (&pool[0][0][0][0])[i];

  for (int b = 0; b < BATCH; ++b)
    for (int h = 0; h < HEADS; ++h)
      for (int p = 0; p < HEADDIM; ++p) {
        const double step = softplus(dt[b][h]);
        double y = (double)D[h] * x[b][h][p];
        for (int n = 0; n < DSTATE; ++n) {
          const int g = h / (HEADS / GROUPS);
          double *const s = &state[slots[b]][h][p][n];
          *s = exp(step * A[h]) * *s + step * x[b][h][p] * B[b][g][n];
          y += *s * C[b][g][n];
        }
        want[b][h][p] = y;
      }

  Tensor tstate, tx, tdt, tA, tB, tC, tD, tslots, tout;
  const ssmk_state_update_args args = {
      .size = sizeof args,
      .state = FLOATS(&tstate, pool, 4, ENTRIES, HEADS, HEADDIM, DSTATE),
      .x = FLOATS(&tx, x, 3, BATCH, HEADS, HEADDIM),
      .dt = FLOATS(&tdt, dt, 2, BATCH, HEADS),
      .A = FLOATS(&tA, A, 1, HEADS),
      .B = FLOATS(&tB, B, 3, BATCH, GROUPS, DSTATE),
      .C = FLOATS(&tC, C, 3, BATCH, GROUPS, DSTATE),
      .D = FLOATS(&tD, D, 1, HEADS),
      .state_indices = INDICES(&tslots, slots, 1, BATCH),
      .out = FLOATS(&tout, out, 3, BATCH, HEADS, HEADDIM),
      .dt_softplus = 1,
  };
  if (!succeeded("state_update", ssmk_state_update(&args))) return;
  compare("state_update: out", &out[0][0][0], &want[0][0][0], BATCH * HEADS * HEADDIM);
  compare("state_update: state", &pool[0][0][0][0], &state[0][0][0][0],
          ENTRIES * HEADS * HEADDIM * DSTATE);
}

enum { WIDTH = 4, STATE_LEN = WIDTH - 1, MORE = 2 };

/* SEQLEN tokens of prefill, then MORE tokens of decode on the state that it left. */
static void convolutions(void) {
  static float x[BATCH][DIM][SEQLEN], more[BATCH][DIM][MORE], weight[DIM][WIDTH], bias[DIM];
  static float out[BATCH][DIM][SEQLEN], out_more[BATCH][DIM][MORE], states[BATCH][DIM][STATE_LEN];
  static double want[BATCH][DIM][SEQLEN], want_more[BATCH][DIM][MORE];
  static double want_states[BATCH][DIM][STATE_LEN];
  fill(&x[0][0][0], BATCH * DIM * SEQLEN);
  fill(&more[0][0][0], BATCH * DIM * MORE);
  fill(&weight[0][0], DIM * WIDTH);
  fill(bias, DIM);

  for (int b = 0; b < BATCH; ++b)
    for (int d = 0; d < DIM; ++d) {
      double inputs[STATE_LEN + SEQLEN + MORE] = {0};
      for (int t = 0; t < SEQLEN; ++t) inputs[STATE_LEN + t] = x[b][d][t];
      for (int t = 0; t < MORE; ++t) inputs[STATE_LEN + SEQLEN + t] = more[b][d][t];
      for (int t = 0; t < SEQLEN + MORE; ++t) {
        double y = bias[d];
        for (int w = 0; w < WIDTH; ++w) y += weight[d][w] * inputs[t + w];
        *(t < SEQLEN ? &want[b][d][t] : &want_more[b][d][t - SEQLEN]) = silu(y);
      }
      for (int s = 0; s < STATE_LEN; ++s) want_states[b][d][s] = inputs[SEQLEN + MORE + s];
    }

  Tensor tx, tmore, tweight, tbias, tout, tout_more, tstates;
  const ssmk_causal_conv1d_args prefill = {
      .size = sizeof prefill,
      .x = FLOATS(&tx, x, 3, BATCH, DIM, SEQLEN),
      .weight = FLOATS(&tweight, weight, 2, DIM, WIDTH),
      .bias = FLOATS(&tbias, bias, 1, DIM),
      .out = FLOATS(&tout, out, 3, BATCH, DIM, SEQLEN),
      .final_states = FLOATS(&tstates, states, 3, BATCH, DIM, STATE_LEN),
      .activation = SSMK_ACTIVATION_SILU,
  };
  if (!succeeded("causal_conv1d", ssmk_causal_conv1d(&prefill))) return;
  compare("causal_conv1d: out", &out[0][0][0], &want[0][0][0], BATCH * DIM * SEQLEN);

  const ssmk_causal_conv1d_update_args decode = {
      .size = sizeof decode,
      .x = FLOATS(&tmore, more, 3, BATCH, DIM, MORE),
      .conv_state = &tstates.t,
      .weight = &tweight.t,
      .bias = &tbias.t,
      .out = FLOATS(&tout_more, out_more, 3, BATCH, DIM, MORE),
      .activation = SSMK_ACTIVATION_SILU,
  };
  if (!succeeded("causal_conv1d_update", ssmk_causal_conv1d_update(&decode))) return;
  compare("causal_conv1d_update: out", &out_more[0][0][0], &want_more[0][0][0],
          BATCH * DIM * MORE);
  compare("causal_conv1d_update: conv_state", &states[0][0][0], &want_states[0][0][0],
          BATCH * DIM * STATE_LEN);
}

/* Mamba-2 in one chunk and more, with a state captured on the way; the scratch is the caller's. */
static void ssd_chunk(void) {
  enum { BATCH = 2, SEQLEN = 150, NHEADS = 4, HEADDIM = 3, NGROUPS = 2, DSTATE = 5, AT = 70 };
  static float x[BATCH][SEQLEN][NHEADS][HEADDIM], dt[BATCH][SEQLEN][NHEADS], A[NHEADS], D[NHEADS];
  static float B[BATCH][SEQLEN][NGROUPS][DSTATE], C[BATCH][SEQLEN][NGROUPS][DSTATE];
  static float states[BATCH][NHEADS][HEADDIM][DSTATE], captured[1][NHEADS][HEADDIM][DSTATE];
  static float out[BATCH][SEQLEN][NHEADS][HEADDIM];
  static double want[BATCH][SEQLEN][NHEADS][HEADDIM], h[BATCH][NHEADS][HEADDIM][DSTATE];
  static double want_captured[NHEADS][HEADDIM][DSTATE];
  int64_t position[1] = {SEQLEN + AT};
  fill(&x[0][0][0][0], BATCH * SEQLEN * NHEADS * HEADDIM);
  fill(&dt[0][0][0], BATCH * SEQLEN * NHEADS);
  fill(&B[0][0][0][0], BATCH * SEQLEN * NGROUPS * DSTATE);
  fill(&C[0][0][0][0], BATCH * SEQLEN * NGROUPS * DSTATE);
  fill(D, NHEADS);
  fill(&states[0][0][0][0], BATCH * NHEADS * HEADDIM * DSTATE);
  for (int i = 0; i < NHEADS; ++i) A[i] = -0.3f * (float)(i + 1);

  for (int b = 0; b < BATCH; ++b)
    for (int k = 0; k < NHEADS; ++k)
      for (int p = 0; p < HEADDIM; ++p) {
        const int g = k / (NHEADS / NGROUPS);
        for (int n = 0; n < DSTATE; ++n) h[b][k][p][n] = states[b][k][p][n];
        for (int t = 0; t < SEQLEN; ++t) {
          const double step = softplus(dt[b][t][k]);
          double y = D[k] * x[b][t][k][p];
          for (int n = 0; n < DSTATE; ++n) {
            h[b][k][p][n] = exp(step * A[k]) * h[b][k][p][n] + step * x[b][t][k][p] * B[b][t][g][n];
            y += h[b][k][p][n] * C[b][t][g][n];
            if (b == 1 && t == AT) want_captured[k][p][n] = h[b][k][p][n];
          }
          want[b][t][k][p] = y;
        }
      }

  Tensor tx, tdt, tA, tB, tC, tD, tstates, tout, tposition, tcaptured;
  DLTensor *const in_place = FLOATS(&tstates, states, 4, BATCH, NHEADS, HEADDIM, DSTATE);
  ssmk_ssd_chunk_args args = {
      .size = sizeof args,
      .x = FLOATS(&tx, x, 4, BATCH, SEQLEN, NHEADS, HEADDIM),
      .dt = FLOATS(&tdt, dt, 3, BATCH, SEQLEN, NHEADS),
      .A = FLOATS(&tA, A, 1, NHEADS),
      .B = FLOATS(&tB, B, 4, BATCH, SEQLEN, NGROUPS, DSTATE),
      .C = FLOATS(&tC, C, 4, BATCH, SEQLEN, NGROUPS, DSTATE),
      .D = FLOATS(&tD, D, 1, NHEADS),
      .initial_states = in_place,
      .final_states = in_place,
      .capture_positions = INDICES(&tposition, position, 1, 1),
      .captured_states = FLOATS(&tcaptured, captured, 4, 1, NHEADS, HEADDIM, DSTATE),
      .out = FLOATS(&tout, out, 4, BATCH, SEQLEN, NHEADS, HEADDIM),
      .dt_softplus = 1,
  };
  uint64_t bytes = 0;
  if (!succeeded("ssd_chunk", ssmk_ssd_chunk_workspace(&args, &bytes))) return;
  char *const memory = malloc(bytes + 64);
  if (!memory) return;
  args.workspace = memory + (64 - (uintptr_t)memory % 64) % 64;
  args.workspace_bytes = bytes;
  if (succeeded("ssd_chunk", ssmk_ssd_chunk(&args))) {
    compare("ssd_chunk: out", &out[0][0][0][0], &want[0][0][0][0],
            BATCH * SEQLEN * NHEADS * HEADDIM);
    compare("ssd_chunk: final_states", &states[0][0][0][0], &h[0][0][0][0],
            BATCH * NHEADS * HEADDIM * DSTATE);
    compare("ssd_chunk: captured_states", &captured[0][0][0][0], &want_captured[0][0][0],
            NHEADS * HEADDIM * DSTATE);
  }
  free(memory);
}

/* A dense cache of 4-bit codes, to which the call adds each row's newest token. */
static void mla_decode(void) {
  enum { HEADS = 3, LATENT = 64, GROUP = 32, ROPE = 6, CAPACITY = 11 };
  static float q[BATCH][HEADS][LATENT], q_rope[BATCH][HEADS][ROPE], out[BATCH][HEADS][LATENT];
  static uint32_t codes[BATCH][CAPACITY][LATENT / 8];
  static float scales[BATCH][CAPACITY][LATENT / GROUP], biases[BATCH][CAPACITY][LATENT / GROUP];
  static float rope[BATCH][CAPACITY][ROPE], newest[BATCH][LATENT], new_rope[BATCH][ROPE];
  static float lse[BATCH][HEADS], scratch[1 << 16];
  static double want[BATCH][HEADS][LATENT], want_lse[BATCH][HEADS];
  int64_t seqlens[BATCH] = {CAPACITY, 4};
  fill(&q[0][0][0], BATCH * HEADS * LATENT);
  fill(&q_rope[0][0][0], BATCH * HEADS * ROPE);
  fill(&scales[0][0][0], BATCH * CAPACITY * LATENT / GROUP);
  fill(&biases[0][0][0], BATCH * CAPACITY * LATENT / GROUP);
  fill(&rope[0][0][0], BATCH * CAPACITY * ROPE);
  fill(&new_rope[0][0], BATCH * ROPE);
  for (int i = 0; i < BATCH * CAPACITY * LATENT / 8; ++i)
    (&codes[0][0][0])[i] = (seed = seed * 1664525u + 1013904223u);
  /* From -7 / 2 to 8 / 2 in every group: scale -1/2, bias 4, and the values are exact. */
  for (int b = 0; b < BATCH; ++b)
    for (int c = 0; c < LATENT; ++c) newest[b][c] = (float)(c % 16 - 7) / 2;

  Tensor tq, tqr, tcodes, tscales, tbiases, trope, tnew, tnewr, tlens, tout, tlse;
  ssmk_mla_decode_args args = {
      .size = sizeof args,
      .q_nope = FLOATS(&tq, q, 3, BATCH, HEADS, LATENT),
      .q_rope = FLOATS(&tqr, q_rope, 3, BATCH, HEADS, ROPE),
      .codes = tensor(&tcodes, codes, kDLUInt, 32, 3, SIZES(BATCH, CAPACITY, LATENT / 8)),
      .scales = FLOATS(&tscales, scales, 3, BATCH, CAPACITY, LATENT / GROUP),
      .biases = FLOATS(&tbiases, biases, 3, BATCH, CAPACITY, LATENT / GROUP),
      .k_rope = FLOATS(&trope, rope, 3, BATCH, CAPACITY, ROPE),
      .new_latent = FLOATS(&tnew, newest, 2, BATCH, LATENT),
      .new_rope = FLOATS(&tnewr, new_rope, 2, BATCH, ROPE),
      .seqlens = INDICES(&tlens, seqlens, 1, BATCH),
      .out = FLOATS(&tout, out, 3, BATCH, HEADS, LATENT),
      .lse = FLOATS(&tlse, lse, 2, BATCH, HEADS),
      .softmax_scale = 0.25f,
  };
  uint64_t bytes = 0;
  if (!succeeded("mla_decode_workspace", ssmk_mla_decode_workspace(&args, &bytes))) return;
  if (bytes + 64 > sizeof scratch) {
    printf("mla_decode wants a workspace of %lu bytes\n", (unsigned long)bytes);
    ++failures;
    return;
  }
  args.workspace = (void *)(((uintptr_t)scratch + 63) / 64 * 64);
  args.workspace_bytes = bytes;
  if (!succeeded("mla_decode", ssmk_mla_decode(&args))) return;

  for (int b = 0; b < BATCH; ++b)
    for (int h = 0; h < HEADS; ++h) {
      double sum = 0;
      for (int i = 0; i < seqlens[b]; ++i) {
        double value[LATENT], score = 0;
        for (int c = 0; c < LATENT; ++c) {
          const int code = codes[b][i][c / 8] >> 4 * (c % 8) & 15, g = c / GROUP;
          value[c] = (double)code * scales[b][i][g] + biases[b][i][g];
          score += q[b][h][c] * value[c];
        }
        for (int c = 0; c < ROPE; ++c) score += (double)q_rope[b][h][c] * rope[b][i][c];
        const double p = exp(score / 4);
        sum += p;
        for (int c = 0; c < LATENT; ++c) want[b][h][c] += p * value[c];
      }
      for (int c = 0; c < LATENT; ++c) want[b][h][c] /= sum;
      want_lse[b][h] = log(sum);
    }
  compare("mla_decode: out", &out[0][0][0], &want[0][0][0], BATCH * HEADS * LATENT);
  compare("mla_decode: lse", &lse[0][0], &want_lse[0][0], BATCH * HEADS);
  double stored[BATCH][LATENT];
  for (int b = 0; b < BATCH; ++b)
    for (int c = 0; c < LATENT; ++c) {
      const int i = (int)seqlens[b] - 1, code = codes[b][i][c / 8] >> 4 * (c % 8) & 15;
      stored[b][c] = (double)code * scales[b][i][c / GROUP] + biases[b][i][c / GROUP];
    }
  compare("mla_decode: the appended tokens", &newest[0][0], &stored[0][0], BATCH * LATENT);
}

/* What cannot work is refused, and the message tells why. */
static void refusals(void) {
  float number = 0;
  Tensor x;
  ssmk_causal_conv1d_args args = {.size = sizeof args, .x = FLOATS(&x, &number, 3, 1, 1, 1)};
  const int refused =
      ssmk_causal_conv1d(&args) == SSMK_INVALID_ARGUMENT && strstr(ssmk_last_error(), "weight");
  const ssmk_ssd_chunk_args ssd = {.size = sizeof ssd};
  const int absent = ssmk_ssd_chunk(&ssd) == SSMK_INVALID_ARGUMENT &&
                     strstr(ssmk_last_error(), "ssd_chunk: x: is required");
  const int about = ssmk_version() >> 16 == SSMK_VERSION_MAJOR &&
                    ssmk_device_count(kDLCPU) == 1 && ssmk_backend_built(kDLCPU) == 1 &&
                    ssmk_num_threads() >= 1 && ssmk_cpu_isa()[0];
  printf("%-40s %s\n", "refusals", refused && absent ? "ok" : "WRONG");
  printf("%-40s %s (%s, %d threads)\n", "the library itself", about ? "ok" : "WRONG",
         ssmk_cpu_isa(), (int)ssmk_num_threads());
  failures += !(refused && absent) + !about;
}

int main(void) {
  selective_scan();
  ssd_chunk();
  state_update();
  convolutions();
  mla_decode();
  refusals();
  return failures != 0;
}

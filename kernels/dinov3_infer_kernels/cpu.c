/* What the plan for CPUs computes between two products, each in one pass: attention with RoPE, and layer norm with the
   residual before it.  Scores stay in the first cache (FlashAttention, arXiv 2205.14135).  The bits of a row of the
   result depend on its own row of the input alone.  cpu.py compiles this file for the CPU that it runs on. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
enum { W = 16, COLS = 4 }; /* floats of a vector; vectors in a row of a tile, so that the tile fills the registers */
#elif defined(__AVX__)
enum { W = 8, COLS = 2 };
#else
enum { W = 4, COLS = 4 };
#endif
enum { ROWS = 6, QUERIES = 2 * ROWS, KEYS = 512, WIDEST = 128, LINES = 32 }; /* tile; at most; head; rows of a norm */
enum { FLOAT, HALF, BYTE }; /* float32, bfloat16, uint8 about 128 */

#define VECTOR(type, lanes) type __attribute__((vector_size(sizeof(type) * (lanes)), aligned(sizeof(type)), may_alias))
typedef VECTOR(float, W) vec;
typedef VECTOR(int32_t, W) ints;
typedef VECTOR(uint16_t, W) halves;
typedef VECTOR(uint8_t, W) bytes;
typedef VECTOR(float, 4) four; typedef VECTOR(int32_t, 4) four_ints;
typedef float __attribute__((may_alias)) word; /* a float, or two of bfloat16: neighbouring channels, or keys */
#define INLINE static inline __attribute__((always_inline))
#define AT(p) (*(vec *)(p))
#define UNROLL _Pragma("GCC unroll 8") for (int

/* --- vectors ---------------------------------------------------------------------------------------------------- */

INLINE vec all(float x) { return x - (vec){0}; }
INLINE vec larger(vec a, vec b) {
#ifdef __AVX__
    __asm__("vmaxps %2, %1, %0" : "=v"(a) : "v"(a), "v"(b));
    return a;
#else
    return (vec)(((ints)a & (a > b)) | ((ints)b & ~(a > b)));
#endif
}

INLINE float sum_of(vec x) {
    four a = *(four *)&x;
    for (int i = 4; i < W; i += 4) a += *(four *)((float *)&x + i);
    return (a[0] + a[1]) + (a[2] + a[3]);
}

INLINE float largest_of(vec x) {
    four a = *(four *)&x;
    for (int i = 4; i < W; i += 4) {
        const four b = *(four *)((float *)&x + i);
        a = (four)(((four_ints)a & (a > b)) | ((four_ints)b & ~(a > b)));
    }
    const float p = a[0] > a[1] ? a[0] : a[1], q = a[2] > a[3] ? a[2] : a[3];
    return p > q ? p : q;
}

INLINE vec read(const void *p, long i, int kind) {
    if (kind == FLOAT) return AT((const float *)p + i);
    return (vec)(__builtin_convertvector(*(const halves *)((const uint16_t *)p + i), ints) << 16);
}

INLINE void write(vec x, void *p, long i, int kind) {
    if (kind == FLOAT) AT((float *)p + i) = x;
#ifdef __AVX512BF16__
    if (kind == HALF) __asm__("vcvtneps2bf16 %1, %0" : "=v"(*(halves *)((uint16_t *)p + i)) : "v"(x));
#endif
    if (kind == BYTE) { /* what is behind the point is cut off, so half a step more rounds */
        const vec cut = -larger(-larger(x + 128.5f, all(0)), all(-255));
        *(bytes *)((uint8_t *)p + i) = __builtin_convertvector(__builtin_convertvector(cut, ints), bytes);
    }
}

/* 2^x for x <= 0, to 8e-8 of it, or 8e-5 where bfloat16 follows */
INLINE vec power(vec x, int half) {
    x = larger(all(-126), x); /* in this order what is no number stays none */
    const vec whole = x + 12582912.0f, f = x - (whole - 12582912.0f); /* 1.5 * 2^23, whose last bit is 1 */
    const vec p = half ? ((0.055088684f * f + 0.242604051f) * f + 0.693276242f) * f + 0.999928940f
                       : ((((0.00132669704f * f + 0.00967545975f) * f + 0.0555074262f) * f + 0.240221218f) * f +
                          0.693146949f) * f + 1.0f;
    return (vec)((ints)p + ((ints)whole << 23));
}

/* --- c = a b, or c += a b: ROWS rows of a, `cols` vectors of b, `steps` words of each --------------------------- */

/* b lies in panels of one vector by all its steps, `ldb` words from one to the next */
INLINE void tile(int half, int cols, int more, long steps, const word *a, long lda, const word *b, long ldb, float *c,
                 long ldc) {
    vec sum[ROWS][COLS], y[COLS];
    UNROLL i = 0; i < ROWS; i++) UNROLL j = 0; j < cols; j++) sum[i][j] = more ? AT(c + i * ldc + j * W) : all(0);
    for (long s = 0; s < steps; s++) {
        UNROLL j = 0; j < cols; j++) y[j] = AT(b + j * ldb + s * W);
        UNROLL i = 0; i < ROWS; i++) {
            const vec x = all(a[i * lda + s]);
            UNROLL j = 0; j < cols; j++)
#ifdef __AVX512BF16__
                if (half) __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum[i][j]) : "v"(y[j]), "v"(x));
                else
#endif
                    sum[i][j] += x * y[j];
        }
    }
    UNROLL i = 0; i < ROWS; i++) UNROLL j = 0; j < cols; j++) AT(c + i * ldc + j * W) = sum[i][j];
}

#define CASE(half, cols) \
    case half * 8 + cols: tile(half, cols < COLS ? cols : COLS, more, steps, a, lda, b, ldb, c, ldc); break;

/* `wide` vectors of b, shared out evenly among the tiles: narrow ones wait for their own sums */
static __attribute__((noinline)) void product(int half, int more, long wide, long steps, const word *a, long lda,
                                              const word *b, long ldb, float *c, long ldc) {
    for (long tiles = (wide + COLS - 1) / COLS; tiles > 0; tiles--) {
        const long cols = (wide + tiles - 1) / tiles;
        switch (half * 8 + cols) {
            CASE(FLOAT, 1) CASE(FLOAT, 2) CASE(FLOAT, 3) CASE(FLOAT, 4)
            CASE(HALF, 1) CASE(HALF, 2) CASE(HALF, 3) CASE(HALF, 4)
        }
        wide -= cols, b += cols * ldb, c += cols * W;
    }
}

/* --- attention --------------------------------------------------------------------------------------------------- */

struct attention {
    const char *qkv;    /* [B, N, 3, H, D] float32 or bfloat16 */
    const float *turns; /* [N, 2, D/2], cosines and sines of each token; or nothing */
    void *out;          /* [B, N, H, D] */
    char *space;        /* `room` bytes for each thread */
    int64_t room, images, tokens, heads, width, half, kind, chunk; /* queries at a time */
};

/* The channels of one head, turned and times a number, as words */
INLINE void turned(const struct attention *job, int half, const char *from, long n, float scale, word *to) {
    const long D = job->width, h = D / 2;
    const float *const cos = job->turns + n * D, *const sin = cos + h;
    for (long i = 0; i < h; i += W) {
        const vec a = read(from, i, half) * scale, b = read(from, i + h, half) * scale;
        const vec c = job->turns ? AT(cos + i) : all(1), s = job->turns ? AT(sin + i) : all(0);
        write(a * c - b * s, to, i, half);
        write(b * c + a * s, to, i + h, half);
    }
}

/* The weights of some keys, in place of their scores, [KEYS]; what went before is made smaller where one is larger */
INLINE void weighed(int half, int more, float *w, long wide, vec none, float *top, vec *total, float *out, long D) {
    vec most = AT(w + wide - W) += none;
    for (long j = 0; j < wide - W; j += W) most = larger(most, AT(w + j));
    float high = largest_of(most);
    vec sum = all(0);
    if (more) {
        if (*top > high) high = *top;
        const vec less = power(all(*top - high), 0);
        for (long d = 0; d < D; d += W) AT(out + d) *= less;
        sum = *total * less;
    }
    for (long j = 0; j < wide; j += W) {
        const vec p = power(AT(w + j) - high, half);
        sum += p;
        write(p, w, j, half);
    }
    *top = high, *total = sum;
}

INLINE void attend(const struct attention *job, int half, char *space, long unit) {
    const long D = job->width, N = job->tokens, H = job->heads, words = half ? D / 2 : D;
    const long size = half ? 2 : 4, row = 3 * H * D * size, pairs = half ? 2 : 1;
    const long chunks = (N + job->chunk - 1) / job->chunk, head = unit / chunks % H, image = unit / chunks / H;
    const long first = unit % chunks * job->chunk, last = first + job->chunk < N ? first + job->chunk : N;
    const long blocks = (N + KEYS - 1) / KEYS, each = (N + blocks * W - 1) / (blocks * W) * W; /* keys at a time */
    const long length = (N + pairs - 1) / pairs * W; /* of a panel of values */
    const char *const q = job->qkv + image * N * row + head * D * size, *const k = q + row / 3, *v = k + row / 3;
    word *const keys = (word *)space, *const values = keys + (N + W - 1) / W * W * words;
    for (long n = 0; n < N; n += W) {
        word one[W][WIDEST], *const to = keys + n * words;
        for (long i = 0; i < W; i++)
            if (n + i < N) turned(job, half, k + (n + i) * row, n + i, 1, one[i]);
            else memset(one[i], 0, words * sizeof(word));
        for (long i = 0; i < W; i++)
            for (long s = 0; s < words; s++) to[s * W + i] = one[i][s];
    }
    for (long n = 0; n < N; n += pairs, v += pairs * row)
        for (long i = 0; i < D; i += W) {
            word *const to = values + i / W * length + n / pairs * W;
            if (half) {
                const ints low = (ints)read(v, i, HALF), high = n + 1 < N ? (ints)read(v + row, i, HALF) : (ints){0};
                AT(to) = (vec)((low >> 16 & 0xffff) | high);
            } else AT(to) = read(v, i, FLOAT);
        }
    for (long begin = first; begin < last; begin += QUERIES) {
        word some[QUERIES][WIDEST];
        float top[QUERIES], out[QUERIES][WIDEST], weights[QUERIES][KEYS];
        vec total[QUERIES];
        const long rows = last - begin < QUERIES ? last - begin : QUERIES, tiled = (rows + ROWS - 1) / ROWS * ROWS;
        for (long i = 0; i < tiled; i++) {
            const long n = begin + (i < rows ? i : 0);
            turned(job, half, q + n * row, n, 1.44269504f, some[i]); /* log2 e: the weights are powers of 2 */
        }
        for (long block = 0; block < N; block += each) {
            const long count = N - block < each ? N - block : each, wide = (count + W - 1) / W, more = block > 0;
            vec none = all(0); /* of the last keys */
            for (long i = count - (wide - 1) * W; i < W; i++) none[i] = -INFINITY;
            for (long i = 0; i < tiled; i += ROWS)
                product(half, 0, wide, words, some[i], WIDEST, keys + block * words, words * W, weights[i], KEYS);
            for (long i = 0; i < tiled; i++)
                weighed(half, more, weights[i], wide * W, none, top + i, total + i, out[i], D);
            for (long i = 0; i < tiled; i += ROWS)
                product(half, more, D / W, (count + pairs - 1) / pairs, weights[i], KEYS, values + block / pairs * W,
                        length, out[i], WIDEST);
        }
        for (long i = 0; i < rows; i++) {
            const long to = ((image * N + begin + i) * H + head) * D;
            const float share = 1 / sum_of(total[i]);
            for (long d = 0; d < D; d += W) write(AT(out[i] + d) * share, job->out, to + d, job->kind);
        }
    }
}

/* --- layer norm -------------------------------------------------------------------------------------------------- */

struct norm {
    float *x;         /* [T, C]; what is added stays in it */
    const void *more; /* [T, C] to add, float32 or bfloat16; or nothing */
    const float *weight, *bias;
    void *out;
    int64_t rows, width, half, kind;
    double eps;
};

INLINE void normed(const struct norm *job, int half, long n) {
    const long C = job->width;
    float *const x = job->x + n * C;
    vec total = all(0), squares = all(0);
    for (long i = 0; i < C; i += W) {
        if (job->more) AT(x + i) += read(job->more, n * C + i, half);
        total += AT(x + i);
    }
    const float mean = sum_of(total) / C;
    for (long i = 0; i < C; i += W) squares += (AT(x + i) - mean) * (AT(x + i) - mean);
    const float scale = 1 / sqrtf(sum_of(squares) / C + (float)job->eps);
    for (long i = 0; i < C; i += W)
        write((AT(x + i) - mean) * scale * AT(job->weight + i) + AT(job->bias + i), job->out, n * C + i, job->kind);
}

/* --- threads: who is free takes the next piece ------------------------------------------------------------------- */

struct work {
    void (*run)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel of the OpenMP that torch runs on */
    const void *job;
    int64_t norm, threads, next, workers;
};

static void take(void *given) {
    struct work *const work = given;
    const struct norm *const n = work->job;
    const struct attention *const a = work->job; /* one of them */
    char *const space = work->norm ? 0 : a->space + __atomic_fetch_add(&work->workers, 1, __ATOMIC_RELAXED) * a->room;
    const long count = work->norm ? (n->rows + LINES - 1) / LINES
                                  : a->images * a->heads * ((a->tokens + a->chunk - 1) / a->chunk);
    for (long i; (i = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED)) < count;)
        if (!work->norm) a->half ? attend(a, HALF, space, i) : attend(a, FLOAT, space, i);
        else for (long line = i * LINES; line < n->rows && line < (i + 1) * LINES; line++)
            n->half ? normed(n, HALF, line) : normed(n, FLOAT, line);
}

#ifdef __AVX512BF16__
const int multiplies_bfloat16 = 1;
#else
const int multiplies_bfloat16 = 0;
#endif

void fused(struct work *work) {
    if (work->run && work->threads > 1) work->run(take, work, work->threads, 0);
    else take(work);
}

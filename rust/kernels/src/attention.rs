//! Attention over a paged cache of f16 keys and values, with an online softmax, page by page.
//!
//! A query meets its pages in order of position, always 16 positions at a time, whoever else is in the step: its bits
//! depend on nothing but itself (Milakov and Gimelshein 2018, arXiv:1805.02867, for the softmax).

#![expect(
    clippy::needless_range_loop,
    reason = "one index runs over several register arrays at once"
)]

use crate::elementwise::exp;
use crate::pool::{Pool, SendPtr};
use crate::quant::f16_to_f32;
use crate::simd::{Isa, LANES, Simd, dispatch};

/// Positions in a page: one vector of keys per head dimension.
pub const PAGE: usize = LANES;

/// Queries that share the reading of keys and values; also the most that one call of the kernel takes.
const GROUP: usize = 8;

/// The rows of one sequence in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Its first row in the step, and how many.
    pub first_row: usize,
    pub rows: usize,
    /// Its block table inside the step's `pages`: page `i` holds positions `i * PAGE ..`.
    pub first_page: usize,
    pub pages: usize,
    /// The position of its first row; everything before is already in the cache.
    pub start: usize,
    /// The sequence counts as long for rope scalings that distinguish (longrope).
    pub long: bool,
}

/// The cache of one layer: keys `[page][kv_head][dim][PAGE]`, values `[page][kv_head][PAGE][dim]`, f16 bits.
pub struct KvLayer {
    pages: usize,
    kv_heads: usize,
    head_dim: usize,
    /// `head_dim` up to whole vectors.
    padded: usize,
    keys: Vec<u16>,
    values: Vec<u16>,
}

impl KvLayer {
    /// Room for `pages` pages. Memory is taken from the system only as pages are first written.
    pub fn new(pages: usize, kv_heads: usize, head_dim: usize) -> Self {
        let padded = head_dim.next_multiple_of(LANES);
        Self {
            pages,
            kv_heads,
            head_dim,
            padded,
            keys: vec![0; pages * kv_heads * head_dim * PAGE],
            values: vec![0; pages * kv_heads * padded * PAGE],
        }
    }

    /// Bytes that one page takes in one layer.
    pub fn page_bytes(kv_heads: usize, head_dim: usize) -> usize {
        2 * PAGE * kv_heads * (head_dim + head_dim.next_multiple_of(LANES))
    }

    /// Write the keys and values of all rows of a step. Rows are `[.. | k | v]` with keys starting at `offset`.
    ///
    /// # Panics
    /// When a page number is beyond the cache, or a span beyond the rows: defects of the caller.
    pub fn store(
        &mut self,
        pool: &Pool,
        spans: &[Span],
        pages: &[u32],
        qkv: &[f32],
        width: usize,
        offset: usize,
    ) {
        let (dim, padded, kv_heads) = (self.head_dim, self.padded, self.kv_heads);
        check_pages(spans, pages, self.pages);
        let keys = SendPtr(self.keys.as_mut_ptr());
        let values = SendPtr(self.values.as_mut_ptr());
        let rows: usize = spans.iter().map(|s| s.rows).sum();
        let store_head = |head: usize| {
            for span in spans {
                for i in 0..span.rows {
                    let position = span.start + i;
                    let page = pages[span.first_page + position / PAGE] as usize;
                    let slot = position % PAGE;
                    let row = &qkv[(span.first_row + i) * width + offset..][..2 * kv_heads * dim];
                    let (k, v) = row.split_at(kv_heads * dim);
                    let (k, v) = (&k[head * dim..][..dim], &v[head * dim..][..dim]);
                    // SAFETY: the page is inside the cache (checked above), and a head's part of a page is
                    // written by one unit only.
                    unsafe {
                        let key = keys.get().add((page * kv_heads + head) * dim * PAGE + slot);
                        for (d, &x) in k.iter().enumerate() {
                            *key.add(d * PAGE) = f32_to_f16(x);
                        }
                        let value = values
                            .get()
                            .add(((page * kv_heads + head) * PAGE + slot) * padded);
                        for (d, &x) in v.iter().enumerate() {
                            *value.add(d) = f32_to_f16(x);
                        }
                    }
                }
            }
        };
        if rows * kv_heads * dim < 4096 {
            (0..kv_heads).for_each(store_head);
        } else {
            pool.run(kv_heads, store_head);
        }
    }
}

fn check_pages(spans: &[Span], pages: &[u32], limit: usize) {
    for span in spans {
        let needed = (span.start + span.rows).div_ceil(PAGE);
        assert!(
            needed <= span.pages,
            "{needed} pages of positions in a table of {}",
            span.pages
        );
        let table = &pages[span.first_page..span.first_page + span.pages];
        assert!(
            table[..needed].iter().all(|&p| (p as usize) < limit),
            "page beyond the cache of {limit}"
        );
    }
}

/// f32 to f16 bits, to nearest even; what f16 cannot hold becomes its largest number, so that masked positions can be
/// multiplied by zero. NaN stays NaN.
#[inline(always)]
fn f32_to_f16(x: f32) -> u16 {
    let x = if x > 65504.0 { 65504.0 } else { x };
    let x = if x < -65504.0 { -65504.0 } else { x };
    half::f16::from_f32(x).to_bits()
}

/// What a layer's attention is.
#[derive(Debug, Clone, Copy)]
pub struct AttentionShape {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Multiplies the scores.
    pub scale: f32,
    /// `softcap * tanh(score / softcap)` (gemma 2).
    pub softcap: Option<f32>,
    /// A query sees the last `window` positions, its own among them.
    pub window: Option<usize>,
}

/// One unit of work: some queries (row, head) of one kv head of one span.
#[derive(Clone, Copy)]
struct Unit {
    span: usize,
    kv_head: usize,
    first: usize,
    count: usize,
}

/// Reusable memory for the units of a step.
#[derive(Default)]
pub struct AttentionPlan(Vec<Unit>);

impl AttentionPlan {
    fn fill(&mut self, shape: &AttentionShape, spans: &[Span], threads: usize) {
        self.0.clear();
        let group = shape.heads / shape.kv_heads;
        for (i, span) in spans.iter().enumerate() {
            let queries = span.rows * group;
            // Few queries: one head each, to have work for every thread; many: whole groups that share what they read.
            let few = queries * shape.kv_heads < 4 * threads * GROUP;
            let size = if few {
                queries.div_ceil(threads.max(1)).clamp(1, GROUP)
            } else {
                GROUP
            };
            for kv_head in 0..shape.kv_heads {
                for first in (0..queries).step_by(size) {
                    self.0.push(Unit {
                        span: i,
                        kv_head,
                        first,
                        count: size.min(queries - first),
                    });
                }
            }
        }
    }
}

/// One step's queries, keys and values.
pub struct AttentionInput<'a> {
    pub spans: &'a [Span],
    pub pages: &'a [u32],
    /// Rows of `width` floats, queries first.
    pub q: &'a [f32],
    pub width: usize,
}

/// `out[row] = softmax(q k^T * scale) v` for every row and head of the step; rows of `heads * head_dim`.
///
/// # Panics
/// When a page number or a span is out of bounds, or the lengths do not agree.
pub fn attend(
    isa: Isa,
    pool: &Pool,
    plan: &mut AttentionPlan,
    shape: &AttentionShape,
    cache: &KvLayer,
    input: &AttentionInput,
    out: &mut [f32],
) {
    let rows: usize = input.spans.iter().map(|s| s.rows).sum();
    let out_width = shape.heads * shape.head_dim;
    assert_eq!(out.len(), rows * out_width);
    assert!(input.q.len() >= rows * input.width && input.width >= out_width);
    assert_eq!(
        (cache.kv_heads, cache.head_dim),
        (shape.kv_heads, shape.head_dim)
    );
    check_pages(input.spans, input.pages, cache.pages);
    let mut next = 0;
    for span in input.spans {
        assert_eq!(span.first_row, next, "spans follow one another");
        next += span.rows;
    }
    plan.fill(shape, input.spans, pool.threads());
    let out = SendPtr(out.as_mut_ptr());
    let units = &plan.0;
    pool.run(units.len(), |i| {
        // SAFETY: bounds were checked above; a unit's queries are its own.
        unsafe { attend_unit(isa, shape, cache, input, units[i], out.get()) }
    });
}

dispatch! {
    unsafe fn attend_unit<>(shape: &AttentionShape, cache: &KvLayer, input: &AttentionInput, unit: Unit, out: *mut f32) = unit_body
}

#[inline(always)]
unsafe fn unit_body<S: Simd>(
    shape: &AttentionShape,
    cache: &KvLayer,
    input: &AttentionInput,
    unit: Unit,
    out: *mut f32,
) {
    unsafe {
        match unit.count {
            1 => queries::<S, 1>(shape, cache, input, unit, out),
            2 => queries::<S, 2>(shape, cache, input, unit, out),
            3 => queries::<S, 3>(shape, cache, input, unit, out),
            4 => queries::<S, 4>(shape, cache, input, unit, out),
            5 => queries::<S, 5>(shape, cache, input, unit, out),
            6 => queries::<S, 6>(shape, cache, input, unit, out),
            7 => queries::<S, 7>(shape, cache, input, unit, out),
            _ => queries::<S, GROUP>(shape, cache, input, unit, out),
        }
    }
}

/// The running softmax of one query.
#[derive(Clone, Copy)]
struct Running {
    max: f32,
    sum: [f32; LANES],
}

/// `Q` queries of one kv head against all pages that any of them sees. A page that one of them does not see leaves its
/// bits alone: its weights there are exactly zero, and the cache holds only finite numbers.
#[inline(always)]
unsafe fn queries<S: Simd, const Q: usize>(
    shape: &AttentionShape,
    cache: &KvLayer,
    input: &AttentionInput,
    unit: Unit,
    out: *mut f32,
) {
    let span = &input.spans[unit.span];
    let group = shape.heads / shape.kv_heads;
    let dim = shape.head_dim;
    let padded = cache.padded;
    let mut q = [std::ptr::null::<f32>(); Q];
    let mut to = [std::ptr::null_mut::<f32>(); Q];
    let mut position = [0usize; Q];
    for i in 0..Q {
        let (row, head) = (
            (unit.first + i) / group,
            unit.kv_head * group + (unit.first + i) % group,
        );
        let at = span.first_row + row;
        position[i] = span.start + row;
        // SAFETY: rows and heads are inside `q` and `out`, checked by `attend`.
        unsafe {
            q[i] = input.q.as_ptr().add(at * input.width + head * dim);
            to[i] = out.add((at * shape.heads + head) * dim);
        }
    }
    let sees = |p: usize| shape.window.map_or(0, |w| (p + 1).saturating_sub(w));
    let first_page = sees(position[0]) / PAGE;
    let last_page = position[Q - 1] / PAGE;
    let mut running = [Running {
        max: -1e30,
        sum: [0.0; LANES],
    }; Q];
    // Sums of values, `[query][padded]`: on the stack for ordinary heads.
    let mut small = [0f32; GROUP * 256];
    let mut large = Vec::new();
    let acc: &mut [f32] = if Q * padded <= small.len() {
        &mut small[..Q * padded]
    } else {
        large.resize(Q * padded, 0.0);
        &mut large
    };
    for page in first_page..=last_page {
        let number = input.pages[span.first_page + page] as usize;
        let mut weights = [[0f32; LANES]; Q];
        // SAFETY: the page is inside the cache, checked by `attend`.
        unsafe {
            let keys = cache
                .keys
                .as_ptr()
                .add((number * shape.kv_heads + unit.kv_head) * dim * PAGE);
            scores::<S, Q>(&q, keys, dim, &mut weights);
        }
        let mut rescale = [1f32; Q];
        for i in 0..Q {
            let visible = sees(position[i])..position[i] + 1;
            rescale[i] = soften(
                shape,
                &mut weights[i],
                page * PAGE,
                visible,
                &mut running[i],
            );
        }
        // SAFETY: as above; `acc` is `Q * padded` long.
        unsafe {
            let values = cache
                .values
                .as_ptr()
                .add((number * shape.kv_heads + unit.kv_head) * PAGE * padded);
            add_values::<S, Q>(&weights, &rescale, values, padded, acc.as_mut_ptr());
        }
    }
    for i in 0..Q {
        let mut sum = running[i].sum;
        for half in [8, 4, 2, 1] {
            for j in 0..half {
                sum[j] += sum[j + half];
            }
        }
        for d in 0..dim {
            // SAFETY: `to[i]` has `dim` floats of its own.
            unsafe { *to[i].add(d) = acc[i * padded + d] / sum[0] };
        }
    }
}

/// Dot products of `Q` queries with the sixteen keys of a page.
#[inline(always)]
unsafe fn scores<S: Simd, const Q: usize>(
    q: &[*const f32; Q],
    keys: *const u16,
    dim: usize,
    out: &mut [[f32; LANES]; Q],
) {
    unsafe {
        // Two chains, even and odd dimensions: one alone would wait for its own latency.
        let mut even = [S::splat(0.0); Q];
        let mut odd = [S::splat(0.0); Q];
        let mut d = 0;
        while d + 1 < dim {
            let (k0, k1) = (
                S::load_f16(keys.add(d * PAGE)),
                S::load_f16(keys.add((d + 1) * PAGE)),
            );
            for i in 0..Q {
                even[i] = S::fma(k0, S::splat(*q[i].add(d)), even[i]);
                odd[i] = S::fma(k1, S::splat(*q[i].add(d + 1)), odd[i]);
            }
            d += 2;
        }
        if d < dim {
            let k = S::load_f16(keys.add(d * PAGE));
            for i in 0..Q {
                even[i] = S::fma(k, S::splat(*q[i].add(d)), even[i]);
            }
        }
        for i in 0..Q {
            S::store(out[i].as_mut_ptr(), S::add(even[i], odd[i]));
        }
    }
}

/// Turn a page's scores into weights relative to the running maximum; returns what older sums must be multiplied by.
#[inline(always)]
fn soften(
    shape: &AttentionShape,
    scores: &mut [f32; LANES],
    first: usize,
    visible: std::ops::Range<usize>,
    running: &mut Running,
) -> f32 {
    for s in scores.iter_mut() {
        *s *= shape.scale;
    }
    if let Some(cap) = shape.softcap {
        for s in scores.iter_mut() {
            // tanh(t) = 1 - 2 / (exp(2 t) + 1)
            *s = cap * (1.0 - 2.0 / (exp(2.0 * *s / cap) + 1.0));
        }
    }
    let whole = visible.start <= first && first + PAGE <= visible.end;
    if !whole {
        for (j, s) in scores.iter_mut().enumerate() {
            *s = if visible.contains(&(first + j)) {
                *s
            } else {
                f32::NEG_INFINITY
            };
        }
    }
    let mut lanes = *scores;
    for half in [8, 4, 2, 1] {
        for j in 0..half {
            lanes[j] = if lanes[j + half] > lanes[j] {
                lanes[j + half]
            } else {
                lanes[j]
            };
        }
    }
    let max = if lanes[0] > running.max {
        lanes[0]
    } else {
        running.max
    };
    let rescale = if max > running.max {
        exp(running.max - max)
    } else {
        1.0
    };
    running.max = max;
    for (s, sum) in scores.iter_mut().zip(&mut running.sum) {
        let weight = if *s == f32::NEG_INFINITY {
            0.0
        } else {
            exp(*s - max)
        };
        *sum = *sum * rescale + weight;
        *s = weight;
    }
    rescale
}

/// `acc = acc * rescale + weights * values`, sixteen dimensions at a time.
#[inline(always)]
unsafe fn add_values<S: Simd, const Q: usize>(
    weights: &[[f32; LANES]; Q],
    rescale: &[f32; Q],
    values: *const u16,
    padded: usize,
    acc: *mut f32,
) {
    unsafe {
        for c in (0..padded).step_by(LANES) {
            let mut sums = [S::splat(0.0); Q];
            for i in 0..Q {
                sums[i] = S::mul(S::load_f32(acc.add(i * padded + c)), S::splat(rescale[i]));
            }
            for j in 0..PAGE {
                let v = S::load_f16(values.add(j * padded + c));
                for i in 0..Q {
                    sums[i] = S::fma(v, S::splat(weights[i][j]), sums[i]);
                }
            }
            for i in 0..Q {
                S::store(acc.add(i * padded + c), sums[i]);
            }
        }
    }
}

/// The definition, for tests: f64, no pages in sight.
#[doc(hidden)]
pub fn attend_naive(shape: &AttentionShape, cache: &KvLayer, input: &AttentionInput) -> Vec<f64> {
    let rows: usize = input.spans.iter().map(|s| s.rows).sum();
    let (dim, group) = (shape.head_dim, shape.heads / shape.kv_heads);
    let mut out = vec![0f64; rows * shape.heads * dim];
    for span in input.spans {
        let page = |p: usize, kv: usize| {
            input.pages[span.first_page + p / PAGE] as usize * shape.kv_heads + kv
        };
        for i in 0..span.rows {
            let (row, position) = (span.first_row + i, span.start + i);
            let first = shape.window.map_or(0, |w| (position + 1).saturating_sub(w));
            for head in 0..shape.heads {
                let q = &input.q[row * input.width + head * dim..][..dim];
                let key = |p: usize, d: usize| {
                    cache.keys[(page(p, head / group) * dim + d) * PAGE + p % PAGE]
                };
                let value = |p: usize, d: usize| {
                    cache.values[(page(p, head / group) * PAGE + p % PAGE) * cache.padded + d]
                };
                let score = |p: usize| {
                    let dot: f64 = (0..dim)
                        .map(|d| f64::from(q[d]) * f64::from(f16_to_f32(key(p, d))))
                        .sum();
                    let s = dot * f64::from(shape.scale);
                    shape
                        .softcap
                        .map_or(s, |c| f64::from(c) * (s / f64::from(c)).tanh())
                };
                let scores: Vec<f64> = (first..=position).map(score).collect();
                let max = scores.iter().cloned().fold(f64::MIN, f64::max);
                let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                for (p, s) in (first..=position).zip(&scores) {
                    for d in 0..dim {
                        out[(row * shape.heads + head) * dim + d] +=
                            (s - max).exp() / sum * f64::from(f16_to_f32(value(p, d)));
                    }
                }
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n)
            .map(|i| (((i + seed) * 7919 % 10007) as f32 / 5003.5 - 1.0) * 2.0)
            .collect()
    }

    struct Case {
        shape: AttentionShape,
        cache: KvLayer,
        spans: Vec<Span>,
        pages: Vec<u32>,
        qkv: Vec<f32>,
        width: usize,
    }

    /// Two sequences, one with a past, whose pages lie scattered; keys and values of all positions stored.
    fn case(
        heads: usize,
        kv_heads: usize,
        dim: usize,
        window: Option<usize>,
        softcap: Option<f32>,
    ) -> Case {
        let shape = AttentionShape {
            heads,
            kv_heads,
            head_dim: dim,
            scale: 0.3,
            softcap,
            window,
        };
        let mut cache = KvLayer::new(16, kv_heads, dim);
        let width = (heads + 2 * kv_heads) * dim;
        let pages: Vec<u32> = vec![3, 9, 1, 7, 15, 0, 2, 4, 6];
        let pool = Pool::new(2);
        // The past of the first sequence.
        let past = Span {
            first_row: 0,
            rows: 40,
            first_page: 0,
            pages: 5,
            start: 0,
            long: false,
        };
        cache.store(
            &pool,
            &[past],
            &pages,
            &numbers(40 * width, 5),
            width,
            heads * dim,
        );
        let spans = vec![
            Span {
                first_row: 0,
                rows: 21,
                first_page: 0,
                pages: 5,
                start: 40,
                long: false,
            },
            Span {
                first_row: 21,
                rows: 35,
                first_page: 5,
                pages: 4,
                start: 0,
                long: false,
            },
        ];
        let qkv = numbers(56 * width, 77);
        cache.store(&pool, &spans, &pages, &qkv, width, heads * dim);
        Case {
            shape,
            cache,
            spans,
            pages,
            qkv,
            width,
        }
    }

    fn run(c: &Case, isa: Isa, threads: usize) -> Vec<f32> {
        let input = AttentionInput {
            spans: &c.spans,
            pages: &c.pages,
            q: &c.qkv,
            width: c.width,
        };
        let mut out = vec![0.0; 56 * c.shape.heads * c.shape.head_dim];
        attend(
            isa,
            &Pool::new(threads),
            &mut AttentionPlan::default(),
            &c.shape,
            &c.cache,
            &input,
            &mut out,
        );
        out
    }

    #[test]
    fn attention_is_the_definition_on_every_path() {
        for (heads, kv, dim, window, softcap) in [
            (9, 3, 64, None, None),
            (4, 2, 24, Some(32), None),
            (4, 1, 256, Some(7), None),
            (2, 2, 31, None, Some(5.0)),
        ] {
            let c = case(heads, kv, dim, window, softcap);
            let input = AttentionInput {
                spans: &c.spans,
                pages: &c.pages,
                q: &c.qkv,
                width: c.width,
            };
            let want = attend_naive(&c.shape, &c.cache, &input);
            let scalar = run(&c, Isa::SCALAR, 2);
            for (got, want) in scalar.iter().zip(&want) {
                assert!(
                    (f64::from(*got) - want).abs() < 2e-5,
                    "{heads}/{kv} x {dim}: {got} for {want}"
                );
            }
            for isa in Isa::available() {
                assert_eq!(run(&c, isa, 2), scalar, "{}", isa.name());
            }
        }
    }

    #[test]
    fn a_query_does_not_depend_on_its_company_or_on_threads() {
        let c = case(9, 3, 64, Some(20), None);
        let together = run(&c, Isa::detect(), 2);
        assert_eq!(run(&c, Isa::detect(), 5), together);
        let width = c.shape.heads * c.shape.head_dim;
        for row in 0..21 {
            let span = Span {
                first_row: 0,
                rows: 1,
                start: 40 + row,
                ..c.spans[0]
            };
            let q = &c.qkv[row * c.width..][..c.width];
            let input = AttentionInput {
                spans: &[span],
                pages: &c.pages,
                q,
                width: c.width,
            };
            let mut alone = vec![0.0; width];
            let plan = &mut AttentionPlan::default();
            attend(
                Isa::detect(),
                &Pool::new(1),
                plan,
                &c.shape,
                &c.cache,
                &input,
                &mut alone,
            );
            assert_eq!(alone, together[row * width..][..width], "row {row}");
        }
    }

    #[test]
    fn what_f16_cannot_hold_is_its_largest_number() {
        assert_eq!(f32_to_f16(1e9), half::f16::MAX.to_bits());
        assert_eq!(f32_to_f16(f32::NEG_INFINITY), half::f16::MIN.to_bits());
    }

    #[test]
    #[should_panic(expected = "beyond the cache")]
    fn a_page_beyond_the_cache_is_refused() {
        let mut cache = KvLayer::new(2, 1, 16);
        let span = Span {
            first_row: 0,
            rows: 1,
            first_page: 0,
            pages: 1,
            start: 0,
            long: false,
        };
        cache.store(&Pool::new(1), &[span], &[2], &[0.0; 48], 48, 16);
    }
}

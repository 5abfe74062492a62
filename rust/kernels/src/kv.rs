//! The cache of keys and values: f16, in pages, keys transposed inside their page. Knows nothing of attention.

use crate::pool::{Pool, SendPtr};
use crate::simd::{Isa, LANES, Simd, dispatch};

/// Positions in a page: one vector of keys per head dimension.
pub const PAGE: usize = LANES;

/// Rows that one unit of work stores for one head.
const ROWS: usize = 64;

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
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    /// `head_dim` up to whole vectors.
    pub(crate) padded: usize,
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
    #[expect(
        clippy::too_many_arguments,
        reason = "a step's parts are slices of the caller's"
    )]
    pub fn store(
        &mut self,
        isa: Isa,
        pool: &Pool,
        spans: &[Span],
        pages: &[u32],
        qkv: &[f32],
        width: usize,
        offset: usize,
    ) {
        self.check_pages(spans, pages);
        let rows: usize = spans.iter().map(|s| s.rows).sum();
        let kv_heads = self.kv_heads;
        assert!(qkv.len() >= rows * width && width >= offset + 2 * kv_heads * self.head_dim);
        let to = Places {
            keys: SendPtr(self.keys.as_mut_ptr()),
            values: SendPtr(self.values.as_mut_ptr()),
            kv_heads,
            dim: self.head_dim,
            padded: self.padded,
        };
        let store = |unit: usize| {
            let (head, block) = (unit % kv_heads, unit / kv_heads * ROWS);
            for span in spans {
                let first = block.max(span.first_row);
                let last = (block + ROWS).min(span.first_row + span.rows);
                for row in first..last.max(first) {
                    let position = span.start + row - span.first_row;
                    let page = pages[span.first_page + position / PAGE] as usize;
                    let row = &qkv[row * width + offset..][..2 * kv_heads * to.dim];
                    // SAFETY: the page is inside the cache (checked above), and each unit has rows and heads of
                    // its own, whose slots nobody else writes.
                    unsafe {
                        store_row(isa, &to, page * kv_heads + head, position % PAGE, head, row)
                    }
                }
            }
        };
        let units = kv_heads * rows.div_ceil(ROWS);
        if rows * kv_heads * to.dim < 4096 {
            (0..units).for_each(store);
        } else {
            pool.run(units, store);
        }
    }

    /// # Panics
    /// When a span's table has too few pages, or one beyond the cache.
    pub(crate) fn check_pages(&self, spans: &[Span], pages: &[u32]) {
        for span in spans {
            let needed = (span.start + span.rows).div_ceil(PAGE);
            assert!(
                needed <= span.pages,
                "{needed} pages of positions in a table of {}",
                span.pages
            );
            let table = &pages[span.first_page..span.first_page + span.pages];
            assert!(
                table[..needed].iter().all(|&p| (p as usize) < self.pages),
                "page beyond the cache of {}",
                self.pages
            );
        }
    }

    /// The keys of a page and head, `[dim][PAGE]`.
    pub(crate) fn keys(&self, page: usize, head: usize) -> &[u16] {
        let size = self.head_dim * PAGE;
        &self.keys[(page * self.kv_heads + head) * size..][..size]
    }

    /// The values of a page and head, `[PAGE][padded]`.
    pub(crate) fn values(&self, page: usize, head: usize) -> &[u16] {
        let size = self.padded * PAGE;
        &self.values[(page * self.kv_heads + head) * size..][..size]
    }
}

/// Where rows are stored.
struct Places {
    keys: SendPtr<u16>,
    values: SendPtr<u16>,
    kv_heads: usize,
    dim: usize,
    padded: usize,
}

dispatch! {
    unsafe fn store_row<>(to: &Places, at: usize, slot: usize, head: usize, row: &[f32]) = store_body
}

/// One head of one row `[k | v]` to slot `slot` of the `at`-th pair of page and head.
#[inline(always)]
unsafe fn store_body<S: Simd>(to: &Places, at: usize, slot: usize, head: usize, row: &[f32]) {
    let dim = to.dim;
    let (k, v) = row.split_at(to.kv_heads * dim);
    let (k, v) = (&k[head * dim..][..dim], &v[head * dim..][..dim]);
    // SAFETY: `at` and `slot` are inside the cache, says the caller; `dim` is the length of both slices.
    unsafe {
        let keys = to.keys.get().add(at * dim * PAGE + slot);
        let values = to.values.get().add((at * PAGE + slot) * to.padded);
        let mut codes = [0u16; LANES];
        for (c, x) in k.chunks(LANES).enumerate() {
            narrow::<S>(x, &mut codes);
            for (d, &code) in codes[..x.len()].iter().enumerate() {
                *keys.add((c * LANES + d) * PAGE) = code;
            }
        }
        for (c, x) in v.chunks(LANES).enumerate() {
            narrow::<S>(x, &mut codes);
            std::ptr::copy_nonoverlapping(codes.as_ptr(), values.add(c * LANES), x.len());
        }
    }
}

/// Up to sixteen floats to f16 bits, to nearest even; what f16 cannot hold becomes its largest number, so that masked
/// positions can be multiplied by zero. NaN stays NaN.
#[inline(always)]
unsafe fn narrow<S: Simd>(x: &[f32], out: &mut [u16; LANES]) {
    // SAFETY: sixteen floats are read from `x` or its copy.
    unsafe {
        if x.len() == LANES {
            return S::store_f16(out.as_mut_ptr(), S::load_f32(x.as_ptr()));
        }
        let mut whole = [0f32; LANES];
        whole[..x.len()].copy_from_slice(x);
        S::store_f16(out.as_mut_ptr(), S::load_f32(whole.as_ptr()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_f16_cannot_hold_is_its_largest_number() {
        let row = [
            1e9,
            f32::NEG_INFINITY,
            f32::NAN,
            1.0,
            -65504.0,
            65519.0,
            65520.0,
            6e-8,
        ];
        for isa in Isa::available() {
            let mut cache = KvLayer::new(1, 1, 4);
            let span = Span {
                first_row: 0,
                rows: 1,
                first_page: 0,
                pages: 1,
                start: 3,
                long: false,
            };
            cache.store(isa, &Pool::new(1), &[span], &[0], &row, 8, 0);
            let keys: Vec<u16> = cache
                .keys(0, 0)
                .iter()
                .skip(3)
                .step_by(PAGE)
                .copied()
                .collect();
            assert_eq!(keys[..2], [0x7BFF, 0xFBFF], "{}", isa.name());
            assert!(
                keys[2] & 0x7FFF > 0x7C00 && keys[3] == 0x3C00,
                "{}",
                isa.name()
            );
            assert_eq!(
                cache.values(0, 0)[3 * LANES..][..5],
                [0xFBFF, 0x7BFF, 0x7BFF, 1, 0],
                "{}",
                isa.name()
            );
        }
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
        cache.store(
            Isa::SCALAR,
            &Pool::new(1),
            &[span],
            &[2],
            &[0.0; 48],
            48,
            16,
        );
    }
}

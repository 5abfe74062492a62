//! Many rows of activations: some blocks of two tiles are spread out as bytes and floats once, and all rows go over them.
//! Gives the bits that `matmul` gives for few rows.

use std::mem::MaybeUninit;

use crate::activations::{ActBlock, Scales};
use crate::matmul::{Task, each_row, first_sum, scaled, store_out};
use crate::simd::{LANES, Simd, prefetch_line};
use crate::tile::{BLOCK, Format, super_bytes};

/// Blocks of a segment, whole super-blocks: its codes and scales fit the second cache. Lost: 16 blocks, which fit the
/// first; beginning and ending a segment costs more.
const SEGMENT: usize = 64;
/// Bytes of a block of one tile, at most: codes; scales and offsets of halves.
const MOST: usize = BLOCK * LANES + 4 * 4 * LANES;
/// Tiles that share the reading of a row, at most.
const TILES: usize = 2;

/// Rows that go over a task's tiles before the next rows do.
const ROWS: usize = 512;

/// Bytes of a vector.
const VECTOR: usize = 4 * LANES;

#[repr(align(64))]
struct Scratch([MaybeUninit<u8>; SEGMENT * TILES * MOST]);

/// Sums of rows over the segments so far, `[ROWS][TILES][LANES]`.
#[repr(align(64))]
struct Sums([MaybeUninit<f32>; ROWS * TILES * LANES]);

/// Bytes of a block of `T` tiles: codes `[8][T]`, scales `[T]` and, where there are some, offsets `[T]`, or `[2][T]` each.
const fn block_bytes<F: Format>(tiles: usize) -> usize {
    let floats = (1 + F::HALVES as usize) * (1 + F::ZERO.is_none() as usize);
    tiles * (BLOCK * LANES + floats * 4 * LANES)
}

/// All rows times the tiles of a task.
#[inline(always)]
pub(crate) unsafe fn many_rows<S: Simd, F: Format>(task: &Task) {
    let mut scratch = Scratch([MaybeUninit::uninit(); _]);
    let mut sums = Sums([MaybeUninit::uninit(); _]);
    let scratch = scratch.0.as_mut_ptr().cast();
    let sums = sums.0.as_mut_ptr().cast();
    for first in (0..task.x.rows).step_by(ROWS) {
        let rows = first..task.x.rows.min(first + ROWS);
        let mut tile = 0;
        // SAFETY: the caller's; there is room for as many tiles as `Simd::MANY_TILES` says at most.
        unsafe {
            if const { S::MANY_TILES > 1 } {
                while task.count - tile >= 2 {
                    tiles::<S, F, 2>(task, tile, &rows, scratch, sums);
                    tile += 2;
                }
            }
            while tile < task.count {
                tiles::<S, F, 1>(task, tile, &rows, scratch, sums);
                tile += 1;
            }
        }
    }
}

type Range = std::ops::Range<usize>;

/// Rows times `T` tiles.
#[inline(always)]
unsafe fn tiles<S: Simd, F: Format, const T: usize>(
    task: &Task,
    tile: usize,
    rows: &Range,
    scratch: *mut u8,
    sums: *mut f32,
) {
    let blocks = task.inputs / BLOCK;
    for first in (0..blocks).step_by(SEGMENT) {
        let segment = first..blocks.min(first + SEGMENT);
        unsafe {
            for t in 0..T {
                spread::<S, F, T>(task.tiles.tile(task.first + tile + t), &segment, t, scratch);
            }
            let mut row = rows.start;
            while row < rows.end {
                if segment.end == blocks {
                    fetch_next::<S, T>(task, tile, rows, row);
                }
                // The next rows' outputs lie far apart: nobody but us knows that they come.
                for row in row + S::MANY_ROWS..rows.end.min(row + 2 * S::MANY_ROWS) {
                    let out = task.out.add(row * task.stride + tile * LANES).cast::<u8>();
                    for line in 0..T + 1 {
                        prefetch_line(out.wrapping_add(64 * line));
                    }
                }
                let group = Group {
                    tile,
                    row,
                    rows,
                    segment: &segment,
                };
                match S::MANY_ROWS {
                    6 => group.run::<S, F, 6, T>(task, scratch, sums),
                    4 => group.run::<S, F, 4, T>(task, scratch, sums),
                    _ => group.run::<S, F, 1, T>(task, scratch, sums),
                }
                row += S::MANY_ROWS;
            }
        }
    }
}

/// Fetch some lines of the next tiles, so that they are there when all rows have gone over these.
#[inline(always)]
unsafe fn fetch_next<S: Simd, const T: usize>(task: &Task, tile: usize, rows: &Range, row: usize) {
    let last = task.tiles.tile(task.first + tile + T - 1);
    let groups = (rows.len() / S::MANY_ROWS).max(1);
    let lines = (T * last.len() / 64).div_ceil(groups);
    let first = (row - rows.start) / S::MANY_ROWS * lines;
    for line in first..first + lines {
        prefetch_line(last.as_ptr_range().end.wrapping_add(64 * line));
    }
}

/// The blocks `segment` of a tile, as the `at`-th of `T`, to `out`.
#[inline(always)]
unsafe fn spread<S: Simd, F: Format, const T: usize>(
    tile: &[u8],
    segment: &Range,
    at: usize,
    out: *mut u8,
) {
    unsafe {
        let mut p = tile
            .as_ptr()
            .add(segment.start / F::SUPER * super_bytes::<F>());
        let mut out = out.add(at * VECTOR);
        for _ in (segment.start..segment.end).step_by(F::SUPER) {
            let head = F::head::<S>(p);
            p = p.add(F::HEAD);
            for _ in 0..F::SUPER {
                let codes = F::steps::<S>(p);
                each_row!(8, s, {
                    S::store_codes(out.add(s * T * VECTOR), codes[s & 7]);
                });
                let mut to = out.add(8 * T * VECTOR);
                for half in 0..1 + usize::from(F::HALVES) {
                    let (scale, offset) = F::scale::<S>(p.add(F::CODES), head, half);
                    S::store(to.cast(), scale);
                    to = to.add(T * VECTOR);
                    if F::ZERO.is_none() {
                        S::store(to.cast(), offset);
                        to = to.add(T * VECTOR);
                    }
                }
                p = p.add(F::CODES + F::SCALES);
                out = out.add(block_bytes::<F>(T));
            }
        }
    }
}

/// Some rows from `row` on times a segment of some tiles; rows beyond the last are the last again.
struct Group<'a> {
    tile: usize,
    row: usize,
    rows: &'a Range,
    segment: &'a Range,
}

impl Group<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd, F: Format, const M: usize, const T: usize>(
        &self,
        task: &Task,
        scratch: *const u8,
        sums: *mut f32,
    ) {
        unsafe {
            let (tile, segment) = (self.tile, self.segment);
            let blocks = task.inputs / BLOCK;
            let acts = match F::ACTIVATIONS {
                Scales::Block => task.x.blocks,
                Scales::Super => task.x.supers,
            };
            let row = |i: usize| (self.row + i).min(self.rows.end - 1);
            let mut x = [std::ptr::null::<ActBlock>(); M];
            let mut total = [[S::splat(0.0); T]; M];
            for i in 0..M {
                x[i] = acts.as_ptr().add(row(i) * blocks + segment.start);
                if segment.start > 0 {
                    for (t, total) in total[i].iter_mut().enumerate() {
                        *total =
                            S::load_f32(sums.add(((row(i) - self.rows.start) * T + t) * LANES));
                    }
                }
            }
            let mut p = scratch;
            if const { matches!(F::ACTIVATIONS, Scales::Block) } {
                for b in 0..segment.len() {
                    block::<S, F, M, T>(p, &x, b, &mut total);
                    p = p.add(block_bytes::<F>(T));
                }
            } else {
                for b in (0..segment.len()).step_by(8) {
                    let mut sum = [[S::splat(0.0); T]; M];
                    for b in b..b + 8 {
                        block::<S, F, M, T>(p, &x, b, &mut sum);
                        p = p.add(block_bytes::<F>(T));
                    }
                    each_row!(M, i, {
                        let scale = S::splat((*x[i].add(b)).scale);
                        each_row!(T, at most 2, t, {
                            total[i][t] = S::fma(sum[i][t], scale, total[i][t]);
                        });
                    });
                }
            }
            for i in 0..M {
                // Rows that are there twice are stored once: what is added would be added twice.
                if self.row + i >= self.rows.end {
                    continue;
                }
                for t in 0..T {
                    if segment.end < blocks {
                        S::store(
                            sums.add(((row(i) - self.rows.start) * T + t) * LANES),
                            total[i][t],
                        );
                        continue;
                    }
                    let out = task.out.add(row(i) * task.stride + (tile + t) * LANES);
                    let total = scaled::<S, F>(task, tile + t, &*x[i], total[i][t]);
                    store_out::<S>(task, tile + t, out, total);
                }
            }
        }
    }
}

/// A block of `T` tiles times the `b`-th of each row, added to `total`.
#[inline(always)]
unsafe fn block<S: Simd, F: Format, const M: usize, const T: usize>(
    p: *const u8,
    x: &[*const ActBlock; M],
    b: usize,
    total: &mut [[S::F; T]; M],
) {
    unsafe {
        if F::HALVES {
            half::<S, F, M, T, 0, 4>(p, x, b, total);
            half::<S, F, M, T, 4, 8>(p, x, b, total);
            return;
        }
        let dots = dots::<S, F, M, T, 0, 8>(p, x, b);
        each_row!(M, i, {
            let x = &*x[i].add(b);
            each_row!(T, at most 2, t, {
                let mut dots = dots[i][t];
                if const { matches!(F::ACTIVATIONS, Scales::Block) } {
                    dots = S::sums_shift(dots, x.shift);
                }
                total[i][t] = S::fma(S::to_f32(dots), float::<S, T>(p, 0, t), total[i][t]);
                if F::ZERO.is_none() {
                    total[i][t] = S::fma(float::<S, T>(p, 1, t), S::splat(x.sum), total[i][t]);
                }
            });
        });
    }
}

/// The same for steps `FROM..TO`, a half with scales of its own.
#[inline(always)]
unsafe fn half<
    S: Simd,
    F: Format,
    const M: usize,
    const T: usize,
    const FROM: usize,
    const TO: usize,
>(
    p: *const u8,
    x: &[*const ActBlock; M],
    b: usize,
    total: &mut [[S::F; T]; M],
) {
    unsafe {
        let at = FROM / 4;
        let first = at * (1 + usize::from(F::ZERO.is_none()));
        let dots = dots::<S, F, M, T, FROM, TO>(p, x, b);
        each_row!(M, i, {
            let x = &*x[i].add(b);
            each_row!(T, at most 2, t, {
                let scale = float::<S, T>(p, first, t);
                total[i][t] = S::fma(S::to_f32(dots[i][t]), scale, total[i][t]);
                if F::ZERO.is_none() {
                    let sum = S::to_f32(S::sums_splat(x.negated_sums[at]));
                    total[i][t] = S::fma(float::<S, T>(p, first + 1, t), sum, total[i][t]);
                }
            });
        });
    }
}

/// The `i`-th vector of scales or offsets of the `t`-th tile of a block.
#[inline(always)]
unsafe fn float<S: Simd, const T: usize>(p: *const u8, i: usize, t: usize) -> S::F {
    unsafe { S::load_f32(p.add(((8 + i) * T + t) * VECTOR).cast()) }
}

/// The integer dots of steps `FROM..TO` of a block, its zero point taken off.
#[inline(always)]
unsafe fn dots<
    S: Simd,
    F: Format,
    const M: usize,
    const T: usize,
    const FROM: usize,
    const TO: usize,
>(
    p: *const u8,
    x: &[*const ActBlock; M],
    b: usize,
) -> [[S::S; T]; M] {
    unsafe {
        let mut dots = [[S::sums_zero(); T]; M];
        if F::ZERO.is_some() {
            each_row!(M, i, {
                dots[i] = [first_sum::<S, F, FROM, TO>(&*x[i].add(b)); T];
            });
        }
        each_row!(TO, s, {
            if s >= FROM {
                let mut w = [S::load(p); T];
                each_row!(T, at most 2, t, {
                    w[t] = S::load(p.add((s * T + t) * VECTOR));
                });
                each_row!(M, i, {
                    let x = (*x[i].add(b)).codes.as_ptr().add(4 * s);
                    each_row!(T, at most 2, t, {
                        dots[i][t] = match F::SMALL {
                            true => S::dot4::<true>(dots[i][t], w[t], x),
                            false => S::dot4::<false>(dots[i][t], w[t], x),
                        };
                    });
                });
            }
        });
        dots
    }
}

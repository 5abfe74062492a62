//! The resident layout of a weight matrix: tiles of 16 output rows, compact as the file, and the packing into it.
//!
//! A tile runs along the inputs in blocks of 32. A block of a quantised type is its codes (unsigned, bit planes, in the
//! order in which the micro-kernel's four-byte dots want them) followed by its scales for the 16 rows; types with
//! super-blocks put the super-block's scales once before eight blocks. A number is `scale * code + offset`.

use crate::pool::Pool;
use crate::quant::{E2M1_DOUBLED, IQ4_VALUES, TensorType, iq4_xs_scale, k_scale_min, q3_k_scale};
use crate::simd::{LANES, Simd};

/// Inputs in a block.
pub const BLOCK: usize = 32;

/// How one quantised type lies in a tile, and how a block of it is unpacked.
///
/// # Safety
/// The pointers are at the start of a super-block, or of a block, of a tile of this type.
pub(crate) trait Format {
    /// Blocks that share one head.
    const SUPER: usize;
    /// Bytes of that head.
    const HEAD: usize;
    /// Bytes of the codes of a block, then of its scales.
    const CODES: usize;
    const SCALES: usize;
    /// The two halves of a block have scales of their own.
    const HALVES: bool;

    /// The super-block's scale and minimum scale.
    unsafe fn head<S: Simd>(p: *const u8) -> [S::F; 2];
    /// The block's codes: step `s` holds inputs `4 s .. 4 s + 4` of the 16 rows.
    unsafe fn steps<S: Simd>(p: *const u8) -> [S::I; 8];
    /// Scale and offset of the block, or of its half `half`.
    unsafe fn scale<S: Simd>(p: *const u8, head: [S::F; 2], half: usize) -> (S::F, S::F);
}

/// Low nibbles are even steps, high nibbles odd ones.
#[inline(always)]
unsafe fn nibbles<S: Simd>(p: *const u8) -> [S::I; 8] {
    unsafe {
        let w = [
            S::load(p),
            S::load(p.add(64)),
            S::load(p.add(128)),
            S::load(p.add(192)),
        ];
        [
            S::and(w[0], 15),
            S::shr_mask::<4>(w[0], 15),
            S::and(w[1], 15),
            S::shr_mask::<4>(w[1], 15),
            S::and(w[2], 15),
            S::shr_mask::<4>(w[2], 15),
            S::and(w[3], 15),
            S::shr_mask::<4>(w[3], 15),
        ]
    }
}

/// One bit per code: bit `s` of a byte belongs to step `s`; returned at bit `AT` of each code (4 or 2).
#[inline(always)]
unsafe fn bit_plane<S: Simd>(p: *const u8, at4: bool) -> [S::I; 8] {
    unsafe {
        let h = S::load(p);
        if at4 {
            [
                S::shl_mask::<4>(h, 16),
                S::shl_mask::<3>(h, 16),
                S::shl_mask::<2>(h, 16),
                S::shl_mask::<1>(h, 16),
                S::and(h, 16),
                S::shr_mask::<1>(h, 16),
                S::shr_mask::<2>(h, 16),
                S::shr_mask::<3>(h, 16),
            ]
        } else {
            [
                S::shl_mask::<2>(h, 4),
                S::shl_mask::<1>(h, 4),
                S::and(h, 4),
                S::shr_mask::<1>(h, 4),
                S::shr_mask::<2>(h, 4),
                S::shr_mask::<3>(h, 4),
                S::shr_mask::<4>(h, 4),
                S::shr_mask::<5>(h, 4),
            ]
        }
    }
}

/// Two bits per code: byte plane `s / 4`, bits `2 (s % 4)`; returned at the bottom of each code.
#[inline(always)]
unsafe fn pair_plane<S: Simd>(p: *const u8) -> [S::I; 8] {
    unsafe {
        let (a, b) = (S::load(p), S::load(p.add(64)));
        [
            S::and(a, 3),
            S::shr_mask::<2>(a, 3),
            S::shr_mask::<4>(a, 3),
            S::shr_mask::<6>(a, 3),
            S::and(b, 3),
            S::shr_mask::<2>(b, 3),
            S::shr_mask::<4>(b, 3),
            S::shr_mask::<6>(b, 3),
        ]
    }
}

/// The same pairs, at bits 4 and 5.
#[inline(always)]
unsafe fn pair_plane_high<S: Simd>(p: *const u8) -> [S::I; 8] {
    unsafe {
        let (a, b) = (S::load(p), S::load(p.add(64)));
        [
            S::shl_mask::<4>(a, 48),
            S::shl_mask::<2>(a, 48),
            S::and(a, 48),
            S::shr_mask::<2>(a, 48),
            S::shl_mask::<4>(b, 48),
            S::shl_mask::<2>(b, 48),
            S::and(b, 48),
            S::shr_mask::<2>(b, 48),
        ]
    }
}

#[inline(always)]
unsafe fn or_all<S: Simd>(a: [S::I; 8], b: [S::I; 8]) -> [S::I; 8] {
    unsafe {
        [
            S::or(a[0], b[0]),
            S::or(a[1], b[1]),
            S::or(a[2], b[2]),
            S::or(a[3], b[3]),
            S::or(a[4], b[4]),
            S::or(a[5], b[5]),
            S::or(a[6], b[6]),
            S::or(a[7], b[7]),
        ]
    }
}

#[inline(always)]
unsafe fn lookup_all<S: Simd>(a: [S::I; 8], t: &[u8; 16]) -> [S::I; 8] {
    unsafe {
        [
            S::lookup(a[0], t),
            S::lookup(a[1], t),
            S::lookup(a[2], t),
            S::lookup(a[3], t),
            S::lookup(a[4], t),
            S::lookup(a[5], t),
            S::lookup(a[6], t),
            S::lookup(a[7], t),
        ]
    }
}

#[inline(always)]
unsafe fn bytes8<S: Simd>(p: *const u8) -> [S::I; 8] {
    unsafe {
        [
            S::load(p),
            S::load(p.add(64)),
            S::load(p.add(128)),
            S::load(p.add(192)),
            S::load(p.add(256)),
            S::load(p.add(320)),
            S::load(p.add(384)),
            S::load(p.add(448)),
        ]
    }
}

/// A format without super-blocks: an f16 scale per row, and an f16 minimum (`MIN`) or a fixed zero point.
macro_rules! plain_format {
    ($name:ident, codes $codes:expr, min $min:expr, zero $zero:expr, |$p:ident| $steps:expr) => {
        pub(crate) struct $name;
        impl Format for $name {
            const SUPER: usize = 1;
            const HEAD: usize = 0;
            const CODES: usize = $codes;
            const SCALES: usize = if $min { 64 } else { 32 };
            const HALVES: bool = false;
            #[inline(always)]
            unsafe fn head<S: Simd>(_: *const u8) -> [S::F; 2] {
                unsafe { [S::splat(0.0); 2] }
            }
            #[inline(always)]
            unsafe fn steps<S: Simd>($p: *const u8) -> [S::I; 8] {
                unsafe { $steps }
            }
            #[inline(always)]
            unsafe fn scale<S: Simd>(p: *const u8, _: [S::F; 2], _: usize) -> (S::F, S::F) {
                unsafe {
                    let d = S::load_f16(p.cast());
                    let offset = if $min {
                        S::load_f16(p.add(32).cast())
                    } else {
                        S::mul(d, S::splat(-$zero))
                    };
                    (d, offset)
                }
            }
        }
    };
}

/// The zero point that makes signed table values unsigned codes.
const IQ4_ZERO: f32 = 128.0;
const MXFP4_ZERO: f32 = 12.0;

const fn biased(values: &[i8; 16], zero: i16) -> [u8; 16] {
    let mut out = [0; 16];
    let mut i = 0;
    while i < 16 {
        out[i] = (values[i] as i16 + zero) as u8;
        i += 1;
    }
    out
}
static IQ4_TABLE: [u8; 16] = biased(&IQ4_VALUES, 128);
static MXFP4_TABLE: [u8; 16] = biased(&E2M1_DOUBLED, 12);

plain_format!(Q4_0, codes 256, min false, zero 8.0, |p| nibbles::<S>(p));
plain_format!(Q4_1, codes 256, min true, zero 0.0, |p| nibbles::<S>(p));
plain_format!(Q5_0, codes 320, min false, zero 16.0, |p| or_all::<S>(nibbles::<S>(p), bit_plane::<S>(p.add(256), true)));
plain_format!(Q5_1, codes 320, min true, zero 0.0, |p| or_all::<S>(nibbles::<S>(p), bit_plane::<S>(p.add(256), true)));
plain_format!(Q8_0, codes 512, min false, zero 128.0, |p| bytes8::<S>(p));
plain_format!(Iq4Nl, codes 256, min false, zero IQ4_ZERO, |p| lookup_all::<S>(nibbles::<S>(p), &IQ4_TABLE));

pub(crate) struct Mxfp4;
impl Format for Mxfp4 {
    const SUPER: usize = 1;
    const HEAD: usize = 0;
    const CODES: usize = 256;
    const SCALES: usize = 16;
    const HALVES: bool = false;
    #[inline(always)]
    unsafe fn head<S: Simd>(_: *const u8) -> [S::F; 2] {
        unsafe { [S::splat(0.0); 2] }
    }
    #[inline(always)]
    unsafe fn steps<S: Simd>(p: *const u8) -> [S::I; 8] {
        unsafe { lookup_all::<S>(nibbles::<S>(p), &MXFP4_TABLE) }
    }
    #[inline(always)]
    unsafe fn scale<S: Simd>(p: *const u8, _: [S::F; 2], _: usize) -> (S::F, S::F) {
        unsafe {
            let d = S::load_e8m0(p);
            (d, S::mul(d, S::splat(-MXFP4_ZERO)))
        }
    }
}

/// A K-quant whose blocks have an 8-bit scale and an 8-bit minimum per row (Q4_K, Q5_K).
macro_rules! k_min_format {
    ($name:ident, codes $codes:expr, |$p:ident| $steps:expr) => {
        pub(crate) struct $name;
        impl Format for $name {
            const SUPER: usize = 8;
            const HEAD: usize = 64;
            const CODES: usize = $codes;
            const SCALES: usize = 32;
            const HALVES: bool = false;
            #[inline(always)]
            unsafe fn head<S: Simd>(p: *const u8) -> [S::F; 2] {
                unsafe { [S::load_f16(p.cast()), S::load_f16(p.add(32).cast())] }
            }
            #[inline(always)]
            unsafe fn steps<S: Simd>($p: *const u8) -> [S::I; 8] {
                unsafe { $steps }
            }
            #[inline(always)]
            unsafe fn scale<S: Simd>(p: *const u8, head: [S::F; 2], _: usize) -> (S::F, S::F) {
                unsafe {
                    let scale = S::mul(head[0], S::load_u8(p, 0, 255));
                    let min = S::mul(head[1], S::load_u8(p.add(16), 0, 255));
                    (scale, S::mul(min, S::splat(-1.0)))
                }
            }
        }
    };
}
k_min_format!(Q4K, codes 256, |p| nibbles::<S>(p));
k_min_format!(Q5K, codes 320, |p| or_all::<S>(nibbles::<S>(p), bit_plane::<S>(p.add(256), true)));

/// A K-quant with a signed 8-bit scale per row and half block (`HALVES`) or block, and a fixed zero point.
macro_rules! k_signed_format {
    ($name:ident, codes $codes:expr, halves $halves:expr, zero $zero:expr, |$p:ident| $steps:expr) => {
        pub(crate) struct $name;
        impl Format for $name {
            const SUPER: usize = 8;
            const HEAD: usize = 32;
            const CODES: usize = $codes;
            const SCALES: usize = if $halves { 32 } else { 16 };
            const HALVES: bool = $halves;
            #[inline(always)]
            unsafe fn head<S: Simd>(p: *const u8) -> [S::F; 2] {
                unsafe { [S::load_f16(p.cast()), S::splat(0.0)] }
            }
            #[inline(always)]
            unsafe fn steps<S: Simd>($p: *const u8) -> [S::I; 8] {
                unsafe { $steps }
            }
            #[inline(always)]
            unsafe fn scale<S: Simd>(p: *const u8, head: [S::F; 2], half: usize) -> (S::F, S::F) {
                unsafe {
                    let scale = S::mul(head[0], S::load_i8(p.add(16 * half)));
                    (scale, S::mul(scale, S::splat(-$zero)))
                }
            }
        }
    };
}
k_signed_format!(Q3K, codes 192, halves true, zero 4.0, |p| or_all::<S>(pair_plane::<S>(p), bit_plane::<S>(p.add(128), false)));
k_signed_format!(Q6K, codes 384, halves true, zero 32.0, |p| or_all::<S>(nibbles::<S>(p), pair_plane_high::<S>(p.add(256))));
k_signed_format!(Iq4Xs, codes 256, halves false, zero IQ4_ZERO, |p| lookup_all::<S>(nibbles::<S>(p), &IQ4_TABLE));

pub(crate) struct Q2K;
impl Format for Q2K {
    const SUPER: usize = 8;
    const HEAD: usize = 64;
    const CODES: usize = 128;
    const SCALES: usize = 32;
    const HALVES: bool = true;
    #[inline(always)]
    unsafe fn head<S: Simd>(p: *const u8) -> [S::F; 2] {
        unsafe { [S::load_f16(p.cast()), S::load_f16(p.add(32).cast())] }
    }
    #[inline(always)]
    unsafe fn steps<S: Simd>(p: *const u8) -> [S::I; 8] {
        unsafe { pair_plane::<S>(p) }
    }
    #[inline(always)]
    unsafe fn scale<S: Simd>(p: *const u8, head: [S::F; 2], half: usize) -> (S::F, S::F) {
        unsafe {
            let p = p.add(16 * half);
            let scale = S::mul(head[0], S::load_u8(p, 0, 15));
            let min = S::mul(head[1], S::load_u8(p, 4, 15));
            (scale, S::mul(min, S::splat(-1.0)))
        }
    }
}

/// Bytes of a super-block of a format, all 16 rows.
const fn super_bytes<F: Format>() -> usize {
    F::HEAD + F::SUPER * (F::CODES + F::SCALES)
}

/// Inputs and bytes of one super-block of a tile; for float types, of one input.
fn geometry(tensor_type: TensorType) -> (usize, usize) {
    use TensorType as T;
    fn of<F: Format>() -> (usize, usize) {
        (F::SUPER * BLOCK, super_bytes::<F>())
    }
    match tensor_type {
        T::F32 => (1, 4 * LANES),
        T::F16 | T::BF16 => (1, 2 * LANES),
        T::Q4_0 => of::<Q4_0>(),
        T::Q4_1 => of::<Q4_1>(),
        T::Q5_0 => of::<Q5_0>(),
        T::Q5_1 => of::<Q5_1>(),
        T::Q8_0 => of::<Q8_0>(),
        T::Q2_K => of::<Q2K>(),
        T::Q3_K => of::<Q3K>(),
        T::Q4_K => of::<Q4K>(),
        T::Q5_K => of::<Q5K>(),
        T::Q6_K => of::<Q6K>(),
        T::IQ4_NL => of::<Iq4Nl>(),
        T::IQ4_XS => of::<Iq4Xs>(),
        T::MXFP4 => of::<Mxfp4>(),
    }
}

#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([u8; 64]);

/// A weight matrix `[rows, inputs]` in tiles.
pub struct Tiles {
    tensor_type: TensorType,
    rows: usize,
    inputs: usize,
    tile_bytes: usize,
    lines: Vec<Line>,
}

impl Tiles {
    /// Pack a matrix as the file has it: `rows` rows of `tensor_type` blocks over `inputs` numbers. In parallel.
    ///
    /// # Panics
    /// When `data` is not `rows * row_bytes(inputs)` long: the reader of the file checked that.
    pub fn pack(
        tensor_type: TensorType,
        rows: usize,
        inputs: usize,
        data: &[u8],
        pool: &Pool,
    ) -> Self {
        let row_bytes = tensor_type
            .row_bytes(inputs)
            .expect("inputs are whole blocks");
        assert_eq!(
            data.len(),
            rows * row_bytes,
            "bytes of a {rows} x {inputs} {tensor_type:?} matrix"
        );
        let (step, bytes) = geometry(tensor_type);
        let tile_bytes = (inputs / step * bytes).next_multiple_of(64);
        let tiles = rows.div_ceil(LANES);
        let lines_per_tile = tile_bytes / 64;
        let mut lines = vec![Line([0; 64]); tiles * lines_per_tile];
        pool.rows(&mut lines, lines_per_tile, |tile, lines| {
            let first = tile * LANES;
            let count = LANES.min(rows - first);
            let rows = &data[first * row_bytes..(first + count) * row_bytes];
            pack_tile(tensor_type, rows, row_bytes, inputs, line_bytes(lines));
        });
        Self {
            tensor_type,
            rows,
            inputs,
            tile_bytes,
            lines,
        }
    }

    pub fn tensor_type(&self) -> TensorType {
        self.tensor_type
    }
    pub fn rows(&self) -> usize {
        self.rows
    }
    pub fn inputs(&self) -> usize {
        self.inputs
    }
    /// Tiles of 16 rows; the last may be padded with zeros.
    pub fn tiles(&self) -> usize {
        self.rows.div_ceil(LANES)
    }
    /// Resident bytes.
    pub fn bytes(&self) -> usize {
        self.lines.len() * 64
    }
    /// The bytes of tile `i`.
    pub(crate) fn tile(&self, i: usize) -> &[u8] {
        assert!(i < self.tiles());
        let n = self.tile_bytes / 64;
        let lines = &self.lines[i * n..(i + 1) * n];
        // SAFETY: `Line` is 64 plain bytes.
        unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), lines.len() * 64) }
    }
}

fn line_bytes(lines: &mut [Line]) -> &mut [u8] {
    // SAFETY: `Line` is 64 plain bytes; every value of them is valid.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * 64) }
}

fn pack_tile(
    tensor_type: TensorType,
    rows: &[u8],
    row_bytes: usize,
    inputs: usize,
    out: &mut [u8],
) {
    match tensor_type {
        TensorType::F32 => transpose::<4>(rows, row_bytes, inputs, out),
        TensorType::F16 | TensorType::BF16 => transpose::<2>(rows, row_bytes, inputs, out),
        _ => pack_quantised(tensor_type, rows, row_bytes, inputs, out),
    }
}

/// Float types: input by input, the 16 rows side by side.
fn transpose<const N: usize>(rows: &[u8], row_bytes: usize, inputs: usize, out: &mut [u8]) {
    for (r, row) in rows.chunks_exact(row_bytes).enumerate() {
        for i in 0..inputs {
            let at = (i * LANES + r) * N;
            out[at..at + N].copy_from_slice(&row[i * N..i * N + N]);
        }
    }
}

/// One row's super-block of the file, taken apart.
struct Unpacked {
    /// Unsigned codes, block by block in input order.
    codes: [[u8; BLOCK]; 8],
    /// Head bytes: f16 scale, f16 minimum scale.
    head: [[u8; 2]; 2],
    /// Per block: what the format's scale bytes are for this row (f16 pairs, or bytes).
    scales: [[u8; 4]; 8],
}

fn pack_quantised(
    tensor_type: TensorType,
    rows: &[u8],
    row_bytes: usize,
    inputs: usize,
    out: &mut [u8],
) {
    let (step, bytes) = geometry(tensor_type);
    let layout = Layout::of(tensor_type);
    let file_bytes = tensor_type.block_bytes() * step / tensor_type.block_len();
    let mut unpacked = Unpacked {
        codes: [[0; BLOCK]; 8],
        head: [[0; 2]; 2],
        scales: [[0; 4]; 8],
    };
    for (r, row) in rows.chunks_exact(row_bytes).enumerate() {
        for (s, block) in row.chunks_exact(file_bytes).take(inputs / step).enumerate() {
            take_apart(tensor_type, block, &mut unpacked);
            layout.put(&unpacked, r, &mut out[s * bytes..(s + 1) * bytes]);
        }
    }
}

/// Where codes and scales go inside a super-block of a tile.
struct Layout {
    blocks: usize,
    head_halves: usize,
    bits: u32,
    /// Bytes of scales per row and block, and the width of one of them.
    scale_bytes: usize,
    scale_width: usize,
}

impl Layout {
    fn of(tensor_type: TensorType) -> Self {
        use TensorType as T;
        let (blocks, head_halves, bits, scale_bytes, scale_width) = match tensor_type {
            T::Q4_0 | T::IQ4_NL => (1, 0, 4, 2, 2),
            T::Q4_1 => (1, 0, 4, 4, 2),
            T::Q5_0 => (1, 0, 5, 2, 2),
            T::Q5_1 => (1, 0, 5, 4, 2),
            T::Q8_0 => (1, 0, 8, 2, 2),
            T::MXFP4 => (1, 0, 4, 1, 1),
            T::Q2_K => (8, 2, 2, 2, 1),
            T::Q3_K => (8, 1, 3, 2, 1),
            T::Q4_K => (8, 2, 4, 2, 1),
            T::Q5_K => (8, 2, 5, 2, 1),
            T::Q6_K => (8, 1, 6, 2, 1),
            T::IQ4_XS => (8, 1, 4, 1, 1),
            T::F32 | T::F16 | T::BF16 => unreachable!("float types are transposed"),
        };
        Self {
            blocks,
            head_halves,
            bits,
            scale_bytes,
            scale_width,
        }
    }

    fn put(&self, from: &Unpacked, row: usize, out: &mut [u8]) {
        for (h, half) in from.head.iter().enumerate().take(self.head_halves) {
            out[h * 32 + 2 * row..][..2].copy_from_slice(half);
        }
        let codes_bytes = 64 * self.bits as usize;
        let block_bytes = codes_bytes + LANES * self.scale_bytes;
        let mut at = self.head_halves * 32;
        for b in 0..self.blocks {
            let (codes, scales) = out[at..at + block_bytes].split_at_mut(codes_bytes);
            put_codes(self.bits, &from.codes[b], row, codes);
            let width = self.scale_width;
            for (i, scale) in from.scales[b][..self.scale_bytes]
                .chunks_exact(width)
                .enumerate()
            {
                scales[(i * LANES + row) * width..][..width].copy_from_slice(scale);
            }
            at += block_bytes;
        }
    }
}

/// Spread one row's 32 codes over the planes of a block. Rows come one after the other into zeroed bytes.
fn put_codes(bits: u32, codes: &[u8; BLOCK], row: usize, out: &mut [u8]) {
    for (i, &code) in codes.iter().enumerate() {
        let (step, lane) = (i / 4, 4 * row + i % 4);
        match bits {
            8 => out[64 * step + lane] = code,
            2 | 3 => {
                out[64 * (step / 4) + lane] |= (code & 3) << (2 * (step % 4));
                if bits == 3 {
                    out[128 + lane] |= (code >> 2 & 1) << step;
                }
            }
            _ => {
                out[64 * (step / 2) + lane] |= (code & 15) << (4 * (step % 2));
                match bits {
                    5 => out[256 + lane] |= (code >> 4 & 1) << step,
                    6 => out[256 + 64 * (step / 4) + lane] |= (code >> 4 & 3) << (2 * (step % 4)),
                    _ => {}
                }
            }
        }
    }
}

/// Take one row's (super-)block apart, as the GGUF format lays it out.
fn take_apart(tensor_type: TensorType, b: &[u8], out: &mut Unpacked) {
    use TensorType as T;
    match tensor_type {
        T::Q4_0 | T::IQ4_NL => {
            out.scales[0][..2].copy_from_slice(&b[..2]);
            split_nibbles(&b[2..18], &mut out.codes[0]);
        }
        T::Q4_1 => {
            out.scales[0].copy_from_slice(&b[..4]);
            split_nibbles(&b[4..20], &mut out.codes[0]);
        }
        T::Q5_0 => {
            out.scales[0][..2].copy_from_slice(&b[..2]);
            split_nibbles(&b[6..22], &mut out.codes[0]);
            fifth_bits(&b[2..6], &mut out.codes[0]);
        }
        T::Q5_1 => {
            out.scales[0].copy_from_slice(&b[..4]);
            split_nibbles(&b[8..24], &mut out.codes[0]);
            fifth_bits(&b[4..8], &mut out.codes[0]);
        }
        T::Q8_0 => {
            out.scales[0][..2].copy_from_slice(&b[..2]);
            for (code, q) in out.codes[0].iter_mut().zip(&b[2..34]) {
                *code = q ^ 0x80;
            }
        }
        T::MXFP4 => {
            out.scales[0][0] = b[0];
            split_nibbles(&b[1..17], &mut out.codes[0]);
        }
        T::Q2_K => q2_k(b, out),
        T::Q3_K => q3_k(b, out),
        T::Q4_K => q4_k(b, out),
        T::Q5_K => q5_k(b, out),
        T::Q6_K => q6_k(b, out),
        T::IQ4_XS => iq4_xs(b, out),
        T::F32 | T::F16 | T::BF16 => unreachable!("float types are transposed"),
    }
}

/// 16 bytes: low nibbles are the first half, high nibbles the second.
fn split_nibbles(bytes: &[u8], codes: &mut [u8; BLOCK]) {
    for (j, byte) in bytes.iter().enumerate() {
        codes[j] = byte & 15;
        codes[j + 16] = byte >> 4;
    }
}

fn fifth_bits(bytes: &[u8], codes: &mut [u8; BLOCK]) {
    let bits = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    for (j, code) in codes.iter_mut().enumerate() {
        *code |= ((bits >> j & 1) as u8) << 4;
    }
}

fn q2_k(b: &[u8], out: &mut Unpacked) {
    let (scales, qs) = (&b[..16], &b[16..80]);
    out.head = [[b[80], b[81]], [b[82], b[83]]];
    for block in 0..8 {
        let (n, shift) = (block / 4, 2 * (block % 4));
        for (l, code) in out.codes[block].iter_mut().enumerate() {
            *code = qs[32 * n + l] >> shift & 3;
        }
        out.scales[block][..2].copy_from_slice(&scales[2 * block..2 * block + 2]);
    }
}

fn q3_k(b: &[u8], out: &mut Unpacked) {
    let (mask, qs, scales) = (&b[..32], &b[32..96], &b[96..108]);
    out.head[0] = [b[108], b[109]];
    for block in 0..8 {
        let (n, shift) = (block / 4, 2 * (block % 4));
        for (l, code) in out.codes[block].iter_mut().enumerate() {
            *code = (qs[32 * n + l] >> shift & 3) | (mask[l] >> block & 1) << 2;
        }
        for half in 0..2 {
            out.scales[block][half] = q3_k_scale(2 * block + half, scales) as u8;
        }
    }
}

fn q4_k(b: &[u8], out: &mut Unpacked) {
    out.head = [[b[0], b[1]], [b[2], b[3]]];
    for block in 0..8 {
        let (scale, min) = k_scale_min(block, &b[4..16]);
        out.scales[block][..2].copy_from_slice(&[scale, min]);
        let qs = &b[16 + 32 * (block / 2)..][..32];
        for (code, q) in out.codes[block].iter_mut().zip(qs) {
            *code = q >> (4 * (block % 2)) & 15;
        }
    }
}

fn q5_k(b: &[u8], out: &mut Unpacked) {
    out.head = [[b[0], b[1]], [b[2], b[3]]];
    for block in 0..8 {
        let (scale, min) = k_scale_min(block, &b[4..16]);
        out.scales[block][..2].copy_from_slice(&[scale, min]);
        let (high, qs) = (&b[16..48], &b[48 + 32 * (block / 2)..][..32]);
        for (l, code) in out.codes[block].iter_mut().enumerate() {
            *code = (qs[l] >> (4 * (block % 2)) & 15) | (high[l] >> block & 1) << 4;
        }
    }
}

fn q6_k(b: &[u8], out: &mut Unpacked) {
    let (ql, qh, scales) = (&b[..128], &b[128..192], &b[192..208]);
    out.head[0] = [b[208], b[209]];
    for block in 0..8 {
        let (n, quarter) = (block / 4, block % 4);
        let low = &ql[64 * n + 32 * (quarter % 2)..][..32];
        for (l, code) in out.codes[block].iter_mut().enumerate() {
            *code =
                (low[l] >> (4 * (quarter / 2)) & 15) | (qh[32 * n + l] >> (2 * quarter) & 3) << 4;
        }
        out.scales[block][..2].copy_from_slice(&scales[2 * block..2 * block + 2]);
    }
}

fn iq4_xs(b: &[u8], out: &mut Unpacked) {
    out.head[0] = [b[0], b[1]];
    let high = u16::from_le_bytes([b[2], b[3]]);
    for block in 0..8 {
        out.scales[block][0] = iq4_xs_scale(block, high, &b[4..8]) as u8;
        split_nibbles(&b[8 + 16 * block..][..16], &mut out.codes[block]);
    }
}

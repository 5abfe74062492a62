//! One matrix of a quantised checkpoint: its parts in the files, its numbers as the formats define them, and the blocks that
//! a device multiplies. Knows no names and no configuration: `checkpoint.rs` finds the parts and checks them.
//!
//! All formats are one thing: codes, each of which stands for a number, and scales that groups of them share. They differ
//! in how the codes lie, in what a code stands for and in who shares a scale. Numbers are computed in f32, in the order of
//! operations of the formats' own libraries, so that every bit is theirs.

use std::ops::Range;

use half::f16;
use hfcore_kernels::mmap::Mapped;
use hfcore_kernels::pool::Pool;
use hfcore_kernels::quant::{FP4_VALUES, NF4_VALUES, TensorType, dequantize};
use hfcore_kernels::quantize::quantize;

/// Rows that are unpacked together: where codes lie transposed, neighbours share a cache line. A multiple of 8 for AWQ.
const BAND: usize = 32;

/// Inputs in a block of the resident types that share one scale.
const BLOCK: usize = 32;

/// How the numbers of a part are stored; the names are those of safetensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    F32,
    F16,
    BF16,
    F8E4M3,
    F8E5M2,
    F8E8M0,
    I64,
    I32,
    I8,
    U8,
}

impl Dtype {
    const ALL: [(Self, &'static str, usize); 10] = [
        (Self::F32, "F32", 4),
        (Self::F16, "F16", 2),
        (Self::BF16, "BF16", 2),
        (Self::F8E4M3, "F8_E4M3", 1),
        (Self::F8E5M2, "F8_E5M2", 1),
        (Self::F8E8M0, "F8_E8M0", 1),
        (Self::I64, "I64", 8),
        (Self::I32, "I32", 4),
        (Self::I8, "I8", 1),
        (Self::U8, "U8", 1),
    ];

    /// The dtype of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|d| d.1 == name).map(|d| d.0)
    }

    /// As safetensors calls it.
    pub fn name(self) -> &'static str {
        Self::ALL[self as usize].1
    }

    /// Bytes of a number.
    pub fn size(self) -> usize {
        Self::ALL[self as usize].2
    }
}

/// One stored array: where it lies, and its shape, outermost first. Who made it checked that it has as many bytes as that.
#[derive(Debug, Clone)]
pub struct Part {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub file: usize,
    pub bytes: Range<usize>,
}

impl Part {
    /// Its bytes.
    pub fn bytes<'a>(&self, files: &'a [Mapped]) -> &'a [u8] {
        let file = files.get(self.file).map_or(&[][..], |file| &file[..]);
        file.get(self.bytes.clone()).unwrap_or_default()
    }

    /// Its numbers; those of a byte each are powers of two (E8M0), integers are themselves.
    pub fn floats(&self, files: &[Mapped]) -> Vec<f32> {
        let bytes = self.bytes(files);
        let plain = |tensor_type: TensorType| {
            let mut out = vec![0.0; bytes.len() / self.dtype.size()];
            dequantize(tensor_type, bytes, &mut out);
            out
        };
        match self.dtype {
            Dtype::F32 => plain(TensorType::F32),
            Dtype::F16 => plain(TensorType::F16),
            Dtype::BF16 => plain(TensorType::BF16),
            Dtype::F8E4M3 => bytes.iter().map(|b| e4m3(*b)).collect(),
            Dtype::F8E5M2 => bytes.iter().map(|b| e5m2(*b)).collect(),
            Dtype::F8E8M0 | Dtype::U8 => bytes.iter().map(|b| e8m0(*b)).collect(),
            Dtype::I8 => bytes.iter().map(|b| *b as i8 as f32).collect(),
            Dtype::I32 | Dtype::I64 => self.integers(files).map(|n| n as f32).collect(),
        }
    }

    /// Its integers, of I32 or I64; of other dtypes, none.
    pub fn integers<'a>(&self, files: &'a [Mapped]) -> impl Iterator<Item = i64> + use<'a> {
        let bytes = self.bytes(files);
        let (narrow, wide): (&[u8], &[u8]) = match self.dtype {
            Dtype::I32 => (bytes, &[]),
            Dtype::I64 => (&[], bytes),
            _ => (&[], &[]),
        };
        let narrow = narrow
            .as_chunks()
            .0
            .iter()
            .map(|b| i32::from_le_bytes(*b).into());
        narrow.chain(wide.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)))
    }
}

/// How codes of a matrix `[rows, cols]` lie in the bytes of their part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// A byte each, row after row.
    Bytes,
    /// The same, signed: 128 more than their numbers.
    Signed,
    /// So many bits each (2, 4 or 8), lowest first, in words of 32: `[rows, ceil(cols * bits / 32)]`.
    Rows(u32),
    /// The same down the columns: `[ceil(cols * bits / 32), rows]`.
    Columns(u32),
    /// 8 rows in a word of 32 bits, `[cols, rows / 8]`, in the order of AWQ: 0, 2, 4, 6, 1, 3, 5, 7.
    Awq,
    /// Two in a byte, the high half first, row after row: bitsandbytes.
    Nibbles,
}

impl Layout {
    fn bits(self) -> u32 {
        match self {
            Self::Bytes | Self::Signed => 8,
            Self::Rows(bits) | Self::Columns(bits) => bits,
            Self::Awq | Self::Nibbles => 4,
        }
    }

    /// The codes of the rows from `first` on, as many as `out` holds, row after row.
    fn unpack(self, data: &[u8], [rows, cols]: [usize; 2], first: usize, out: &mut [u8]) {
        let from = first * cols;
        match self {
            Self::Bytes => out.copy_from_slice(&data[from..from + out.len()]),
            Self::Signed => {
                let codes = out.iter_mut().zip(&data[from..]);
                codes.for_each(|(code, byte)| *code = byte ^ 0x80);
            }
            Self::Nibbles => {
                for (i, code) in out.iter_mut().enumerate() {
                    let at = from + i;
                    *code = data[at / 2] >> (4 * ((at + 1) % 2)) & 15;
                }
            }
            Self::Awq => unpack_awq(data, rows, cols, first, out),
            Self::Rows(2) => unpack_rows::<4>(data, cols, first, out),
            Self::Rows(4) => unpack_rows::<2>(data, cols, first, out),
            Self::Rows(_) => unpack_rows::<1>(data, cols, first, out),
            Self::Columns(2) => unpack_columns::<4>(data, rows, cols, first, out),
            Self::Columns(4) => unpack_columns::<2>(data, rows, cols, first, out),
            Self::Columns(_) => unpack_columns::<1>(data, rows, cols, first, out),
        }
    }
}

/// Code `i` of a byte that holds `N`.
fn code<const N: usize>(byte: u8, i: usize) -> u8 {
    let bits = 8 / N;
    byte >> (i * bits) & (0xff >> (8 - bits))
}

fn unpack_rows<const N: usize>(data: &[u8], cols: usize, first: usize, out: &mut [u8]) {
    let width = cols.div_ceil(4 * N) * 4;
    for (i, row) in out.chunks_exact_mut(cols).enumerate() {
        let bytes = &data[(first + i) * width..];
        for (codes, byte) in row.chunks_mut(N).zip(bytes) {
            for (k, out) in codes.iter_mut().enumerate() {
                *out = code::<N>(*byte, k);
            }
        }
    }
}

fn unpack_columns<const N: usize>(
    data: &[u8],
    rows: usize,
    cols: usize,
    first: usize,
    out: &mut [u8],
) {
    let count = out.len() / cols;
    for word in 0..cols.div_ceil(4 * N) {
        let at = word * 4 * N;
        let wanted = (4 * N).min(cols - at);
        let words = data[(word * rows + first) * 4..].as_chunks::<4>().0;
        for (i, bytes) in words[..count].iter().enumerate() {
            let out = &mut out[i * cols + at..][..wanted];
            for (codes, byte) in out.chunks_mut(N).zip(bytes) {
                for (k, out) in codes.iter_mut().enumerate() {
                    *out = code::<N>(*byte, k);
                }
            }
        }
    }
}

fn unpack_awq(data: &[u8], rows: usize, cols: usize, first: usize, out: &mut [u8]) {
    let count = out.len() / cols;
    for col in 0..cols {
        let words = data[col * rows / 2 + first / 2..].as_chunks::<4>().0;
        for (word, bytes) in words[..count / 8].iter().enumerate() {
            for (i, row) in [0, 2, 4, 6, 1, 3, 5, 7].into_iter().enumerate() {
                out[(word * 8 + row) * cols + col] = code::<2>(bytes[i / 2], i % 2);
            }
        }
    }
}

/// What a code stands for, before its scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Values {
    /// Itself, less its group's zero point.
    Whole,
    /// A float of 8 bits with 4 of exponent, and no infinity (OCP FP8).
    E4M3,
    /// A float of 8 bits with 5 of exponent.
    E5M2,
    /// bitsandbytes' NormalFloat.
    Nf4,
    /// bitsandbytes' float of 4 bits.
    Fp4,
}

fn e4m3(byte: u8) -> f32 {
    let sign = if byte >> 7 == 1 { -1.0 } else { 1.0 };
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => sign * mantissa * 2f32.powi(-9),
        _ => sign * (8.0 + mantissa) * 2f32.powi(exponent - 10),
    }
}

/// The upper half of an f16.
fn e5m2(byte: u8) -> f32 {
    f16::from_bits(u16::from(byte) << 8).to_f32()
}

/// A power of two; the largest code is no number.
fn e8m0(byte: u8) -> f32 {
    match byte {
        0 => 2f32.powi(-127),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(byte) << 23),
    }
}

impl Values {
    /// What each code stands for; none of whole numbers.
    fn table(self) -> Option<[f32; 256]> {
        let of = |code: u8| match self {
            Self::Whole => 0.0,
            Self::E4M3 => e4m3(code),
            Self::E5M2 => e5m2(code),
            Self::Nf4 => NF4_VALUES[usize::from(code & 15)],
            Self::Fp4 => FP4_VALUES[usize::from(code & 15)],
        };
        (self != Self::Whole).then(|| std::array::from_fn(|code| of(code as u8)))
    }
}

/// Where the scales are, one for each group.
#[derive(Debug, Clone)]
pub enum Scales {
    Plain {
        part: Part,
        /// Groups are the outer dimension, outputs the inner one.
        transposed: bool,
        /// What every number is divided by after its scale.
        divisor: f32,
    },
    /// Quantised themselves: a byte each into `values`, times the scale that `each` of them share, plus `offset`.
    Nested {
        codes: Part,
        values: Part,
        scales: Part,
        each: usize,
        offset: f32,
    },
}

/// What the codes' zero points are.
#[derive(Debug, Clone)]
pub enum Zeros {
    /// One for all.
    Fixed(i16),
    /// Stored like codes, one for each group; `transposed`: as `[groups, outputs]`. They are `add` more than stored, modulo
    /// the number of codes.
    Each {
        part: Part,
        layout: Layout,
        transposed: bool,
        add: u8,
    },
}

/// Which numbers share a scale.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Groups {
    /// So many outputs by so many inputs.
    Blocks([usize; 2]),
    /// Of each output, the inputs of the same number; there are `count` such numbers.
    Index { of: Vec<u32>, count: usize },
    /// So many numbers one after the other, over the ends of rows.
    Flat(usize),
}

/// A matrix in parts. Whoever makes one has checked that the parts are as large as the shape asks.
#[derive(Debug, Clone)]
pub struct Quantised {
    /// What reports call it.
    pub kind: &'static str,
    /// Outputs, inputs. Neither is 0.
    pub shape: [usize; 2],
    pub codes: Part,
    pub layout: Layout,
    pub values: Values,
    pub scales: Scales,
    pub zeros: Zeros,
    pub groups: Groups,
}

impl Quantised {
    /// Rows and columns of the scales.
    fn grid(&self) -> [usize; 2] {
        let [rows, cols] = self.shape;
        match &self.groups {
            Groups::Blocks([r, c]) => [rows.div_ceil(*r), cols.div_ceil(*c)],
            Groups::Index { count, .. } => [rows, *count],
            Groups::Flat(each) => [1, (rows * cols).div_ceil(*each)],
        }
    }

    fn parts(&self) -> impl Iterator<Item = &Part> {
        let scales = match &self.scales {
            Scales::Plain { part, .. } => [Some(part), None, None],
            Scales::Nested {
                codes,
                values,
                scales,
                ..
            } => [Some(codes), Some(values), Some(scales)],
        };
        let zeros = match &self.zeros {
            Zeros::Fixed(_) => None,
            Zeros::Each { part, .. } => Some(part),
        };
        let all = [Some(&self.codes), zeros].into_iter().chain(scales);
        all.flatten()
    }

    /// Bytes of its parts.
    pub fn bytes(&self) -> usize {
        self.parts().map(|part| part.bytes.len()).sum()
    }

    /// Its numbers.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Say that its parts will not be read soon.
    pub fn forget(&self, files: &[Mapped]) {
        for part in self.parts() {
            if let Some(file) = files.get(part.file) {
                file.forget(part.bytes.clone());
            }
        }
    }

    /// At most so many bytes are its blocks.
    pub fn resident_bytes(&self) -> usize {
        let [rows, cols] = self.shape;
        let kept = match self.values {
            Values::Nf4 | Values::Fp4 => self.has_blocks(64),
            _ => self.layout.bits() <= 4 && self.has_blocks(BLOCK),
        };
        let row = match kept {
            true => cols / 32 * 20,
            false if cols.is_multiple_of(BLOCK) => cols / 32 * 34,
            false => cols * 4,
        };
        rows * row
    }

    /// Whether every block of `len` inputs has one scale.
    fn has_blocks(&self, len: usize) -> bool {
        let whole = match self.groups {
            Groups::Blocks([_, each]) => each.is_multiple_of(len),
            Groups::Index { .. } => false,
            Groups::Flat(each) => each.is_multiple_of(len),
        };
        whole && self.shape[1].is_multiple_of(len)
    }

    /// All its numbers, row after row: what the format says they are.
    pub fn floats(&self, files: &[Mapped], pool: Option<&Pool>) -> Vec<f32> {
        let open = Open::new(self, files);
        bands(pool, self.shape[0], self.shape[1], |first, out| {
            open.floats(first, out)
        })
    }

    /// The same as blocks of the type that loses least of it: the codes as they are, where some type has their kind.
    pub fn blocks(&self, files: &[Mapped], pool: &Pool) -> (TensorType, Vec<u8>) {
        let open = Open::new(self, files);
        let form = open.form();
        let tensor_type = form.tensor_type();
        // `form` chose a type whose blocks rows of this length are made of.
        let width = tensor_type.row_bytes(self.shape[1]).unwrap_or(0);
        let blocks = bands(Some(pool), self.shape[0], width, |first, out| {
            open.blocks(form, first, width, out)
        });
        (tensor_type, blocks)
    }
}

/// `rows` rows of `width` items, made by `make(first row, its rows)`, in bands.
fn bands<T: Copy + Default + Send>(
    pool: Option<&Pool>,
    rows: usize,
    width: usize,
    make: impl Fn(usize, &mut [T]) + Sync,
) -> Vec<T> {
    let mut out = vec![T::default(); rows.next_multiple_of(BAND) * width];
    let band = |i: usize, out: &mut [T]| {
        let first = i * BAND;
        make(first, &mut out[..BAND.min(rows - first) * width]);
    };
    match (pool, width) {
        (_, 0) => {}
        (Some(pool), _) => pool.rows(&mut out, BAND * width, band),
        (None, _) => {
            let all = out.chunks_exact_mut(BAND * width).enumerate();
            all.for_each(|(i, out)| band(i, out));
        }
    }
    out.truncate(rows * width);
    out
}

/// What a matrix becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// Codes of 4 bits around 8, and a scale.
    Q4_0,
    /// Codes of 4 bits, a scale and a minimum.
    Q4_1,
    /// Signed codes of 8 bits, and a scale.
    Q8_0,
    /// bitsandbytes' own blocks of 64.
    Own(TensorType),
    /// Its numbers, quantised again.
    Again(TensorType),
}

impl Form {
    fn tensor_type(self) -> TensorType {
        match self {
            Self::Q4_0 => TensorType::Q4_0,
            Self::Q4_1 => TensorType::Q4_1,
            Self::Q8_0 => TensorType::Q8_0,
            Self::Own(tensor_type) | Self::Again(tensor_type) => tensor_type,
        }
    }
}

/// A matrix with its scales and zero points read.
struct Open<'a> {
    of: &'a Quantised,
    codes: &'a [u8],
    table: Option<[f32; 256]>,
    /// Outputs (or blocks of them) by groups.
    scales: Vec<f32>,
    divisor: f32,
    /// One for each scale; or one.
    zeros: Vec<i16>,
    per_row: usize,
}

impl<'a> Open<'a> {
    fn new(of: &'a Quantised, files: &'a [Mapped]) -> Self {
        let grid = of.grid();
        let (scales, divisor) = scales(&of.scales, grid, files);
        Self {
            of,
            codes: of.codes.bytes(files),
            table: of.values.table(),
            scales,
            divisor,
            zeros: zeros(&of.zeros, grid, files),
            per_row: grid[1],
        }
    }

    fn zero(&self, group: usize) -> i16 {
        match self.zeros[..] {
            [zero] => zero,
            _ => self.zeros[group],
        }
    }

    fn scale(&self, group: usize) -> f32 {
        self.scales[group] / self.divisor
    }

    /// Call `f(columns, group)` for what shares a scale in a row, in order.
    fn runs(&self, row: usize, mut f: impl FnMut(Range<usize>, usize)) {
        let cols = self.of.shape[1];
        match &self.of.groups {
            Groups::Blocks([rows, each]) => {
                let first = row / rows * self.per_row;
                for (i, from) in (0..cols).step_by(*each).enumerate() {
                    f(from..cols.min(from + each), first + i);
                }
            }
            Groups::Index { of, count } => {
                for (col, group) in of.iter().enumerate() {
                    f(col..col + 1, row * count + *group as usize);
                }
            }
            Groups::Flat(each) => {
                let (mut from, start) = (0, row * cols);
                while from < cols {
                    let group = (start + from) / each;
                    let to = cols.min((group + 1) * each - start);
                    f(from..to, group);
                    from = to;
                }
            }
        }
    }

    fn unpack(&self, first: usize, rows: usize) -> Vec<u8> {
        let mut codes = vec![0; rows * self.of.shape[1]];
        let shape = self.of.shape;
        self.of.layout.unpack(self.codes, shape, first, &mut codes);
        codes
    }

    /// The numbers of the rows from `first` on.
    fn floats(&self, first: usize, out: &mut [f32]) {
        let cols = self.of.shape[1];
        let codes = self.unpack(first, out.len() / cols);
        let rows = codes.chunks_exact(cols).zip(out.chunks_exact_mut(cols));
        for (i, (codes, out)) in rows.enumerate() {
            self.runs(first + i, |run, group| {
                let (zero, scale) = (self.zero(group), self.scales[group]);
                for (x, code) in out[run.clone()].iter_mut().zip(&codes[run]) {
                    let value = match &self.table {
                        Some(table) => table[usize::from(*code)],
                        None => f32::from(i16::from(*code) - zero),
                    };
                    *x = value * scale;
                    // Apart, so that it rounds as it does there.
                    if self.divisor != 1.0 {
                        *x /= self.divisor;
                    }
                }
            });
        }
    }

    /// What loses least.
    fn form(&self) -> Form {
        let of = self.of;
        if !of.shape[1].is_multiple_of(BLOCK) {
            return Form::Again(TensorType::F32);
        }
        let own = match of.values {
            Values::Nf4 => Some(TensorType::NF4),
            Values::Fp4 => Some(TensorType::FP4),
            _ => None,
        };
        if let Some(own) = own.filter(|own| of.has_blocks(own.block_len())) {
            return Form::Own(own);
        }
        let again = Form::Again(TensorType::Q8_0);
        if of.values != Values::Whole || !of.has_blocks(BLOCK) {
            return again;
        }
        let last = (1 << of.layout.bits()) - 1;
        let lowest = self.zeros.iter().min().map_or(0, |zero| i32::from(*zero));
        let highest = self.zeros.iter().max().map_or(0, |zero| i32::from(*zero));
        let (least, most) = (-highest, last - lowest);
        if least >= -8 && most <= 7 {
            Form::Q4_0
        } else if last < 16 {
            Form::Q4_1
        } else if least >= -128 && most <= 127 {
            Form::Q8_0
        } else {
            again
        }
    }

    /// The blocks of the rows from `first` on, `width` bytes for each.
    fn blocks(&self, form: Form, first: usize, width: usize, out: &mut [u8]) {
        let cols = self.of.shape[1];
        let rows = out.len() / width;
        if let Form::Again(tensor_type) = form {
            let mut numbers = vec![0.0; rows * cols];
            self.floats(first, &mut numbers);
            return quantize(tensor_type, &numbers, None, out);
        }
        if let Form::Own(tensor_type) = form {
            return self.own_blocks(tensor_type, first, width, out);
        }
        let codes = self.unpack(first, rows);
        let bytes = form.tensor_type().block_bytes();
        for (i, (codes, out)) in codes
            .chunks_exact(cols)
            .zip(out.chunks_exact_mut(width))
            .enumerate()
        {
            self.runs(first + i, |run, group| {
                let (scale, zero) = (self.scale(group), self.zero(group));
                let out = &mut out[run.start / BLOCK * bytes..run.end / BLOCK * bytes];
                let blocks = out.chunks_exact_mut(bytes);
                for (out, codes) in blocks.zip(codes[run].as_chunks().0) {
                    block(form, codes, scale, zero, out);
                }
            });
        }
    }
}

impl Open<'_> {
    /// Blocks of 64 codes, two in a byte as they are stored, after their scale in f32.
    fn own_blocks(&self, tensor_type: TensorType, first: usize, width: usize, out: &mut [u8]) {
        let (len, bytes) = (tensor_type.block_len(), tensor_type.block_bytes());
        let cols = self.of.shape[1];
        for (i, out) in out.chunks_exact_mut(width).enumerate() {
            let row = first + i;
            self.runs(row, |run, group| {
                let codes = &self.codes[(row * cols + run.start) / 2..];
                let out = &mut out[run.start / len * bytes..run.end / len * bytes];
                let blocks = out.chunks_exact_mut(bytes).zip(codes.chunks_exact(len / 2));
                for (out, codes) in blocks {
                    let (head, rest) = out.split_at_mut(4);
                    head.copy_from_slice(&self.scale(group).to_le_bytes());
                    rest.copy_from_slice(codes);
                }
            });
        }
    }
}

fn block(form: Form, codes: &[u8; BLOCK], scale: f32, zero: i16, out: &mut [u8]) {
    let half = |x: f32| f16::from_f32(x).to_le_bytes();
    let (head, rest) = out.split_at_mut(if form == Form::Q4_1 { 4 } else { 2 });
    head[..2].copy_from_slice(&half(scale));
    match form {
        Form::Q8_0 => {
            let all = rest.iter_mut().zip(codes);
            all.for_each(|(out, code)| *out = (i16::from(*code) - zero) as u8);
            return;
        }
        Form::Q4_1 => head[2..].copy_from_slice(&half(-scale * f32::from(zero))),
        _ => {}
    }
    let up = if form == Form::Q4_0 { 8 - zero } else { 0 };
    let code = |i: usize| (i16::from(codes[i]) + up) as u8 & 15;
    for (i, out) in rest.iter_mut().enumerate() {
        *out = code(i) | code(i + BLOCK / 2) << 4;
    }
}

/// Every scale in the order of the grid, and what the numbers are divided by after it.
fn scales(of: &Scales, [rows, cols]: [usize; 2], files: &[Mapped]) -> (Vec<f32>, f32) {
    match of {
        Scales::Plain {
            part,
            transposed,
            divisor,
        } => {
            let stored = part.floats(files);
            let scales = match transposed {
                true => transpose(&stored, cols, rows),
                false => stored,
            };
            (scales, *divisor)
        }
        Scales::Nested {
            codes,
            values,
            scales,
            each,
            offset,
        } => {
            let (values, scales) = (values.floats(files), scales.floats(files));
            let groups = codes.bytes(files).chunks(*each).zip(&scales);
            let of_group = |(codes, scale): (&[u8], &f32)| {
                let of = |code: &u8| values[usize::from(*code)] * scale + offset;
                codes.iter().map(of).collect::<Vec<f32>>()
            };
            (groups.flat_map(of_group).collect(), 1.0)
        }
    }
}

fn zeros(of: &Zeros, [rows, cols]: [usize; 2], files: &[Mapped]) -> Vec<i16> {
    let (part, layout, transposed, add) = match of {
        Zeros::Fixed(zero) => return vec![*zero],
        Zeros::Each {
            part,
            layout,
            transposed,
            add,
        } => (part, *layout, *transposed, *add),
    };
    let shape = if transposed {
        [cols, rows]
    } else {
        [rows, cols]
    };
    let mut codes = vec![0; rows * cols];
    layout.unpack(part.bytes(files), shape, 0, &mut codes);
    if transposed {
        codes = transpose(&codes, cols, rows);
    }
    let mask = (1_u32 << layout.bits()) - 1;
    let zero = |code: u8| ((u32::from(code) + u32::from(add)) & mask) as i16;
    codes.into_iter().map(zero).collect()
}

/// `[rows, cols]` as `[cols, rows]`.
fn transpose<T: Copy>(from: &[T], rows: usize, cols: usize) -> Vec<T> {
    let column = |col: usize| (0..rows).map(move |row| from[row * cols + col]);
    (0..cols).flat_map(column).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Codes of `[rows, cols]` that no two neighbours share, of so many bits.
    fn codes(rows: usize, cols: usize, bits: u32) -> Vec<u8> {
        let code = |i: usize| ((i * 7 + i / cols * 3) % (1 << bits)) as u8;
        (0..rows * cols).map(code).collect()
    }

    /// As words of 32 bits, lowest first, along the rows of `codes`.
    fn words(codes: &[u8], cols: usize, bits: u32) -> Vec<u32> {
        let word = |c: &[u8]| {
            let shifted = c.iter().zip((0..).step_by(bits as usize));
            shifted.fold(0, |word, (code, shift)| word | u32::from(*code) << shift)
        };
        let row = |row: &[u8]| row.chunks(32 / bits as usize).map(word).collect::<Vec<_>>();
        codes.chunks(cols).flat_map(row).collect()
    }

    fn bytes(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// All codes, unpacked in two bands.
    fn unpacked(layout: Layout, data: &[u8], shape: [usize; 2], first: usize) -> Vec<u8> {
        let mut out = vec![0xff; shape[0] * shape[1]];
        let (a, b) = out.split_at_mut(first * shape[1]);
        layout.unpack(data, shape, 0, a);
        layout.unpack(data, shape, first, b);
        out
    }

    #[test]
    fn codes_unpack_from_every_layout() {
        for bits in [2, 4, 8] {
            // The last word of a row is not full.
            let (rows, cols) = (16, 36 + 2);
            let codes = codes(rows, cols, bits);
            let along = words(&codes, cols, bits);
            let down = transpose(&along, rows, along.len() / rows);
            let shape = [rows, cols];
            assert_eq!(
                unpacked(Layout::Rows(bits), &bytes(&along), shape, 8),
                codes
            );
            assert_eq!(
                unpacked(Layout::Columns(bits), &bytes(&down), shape, 8),
                codes
            );
        }
        let codes = codes(16, 6, 4);
        let pairs = codes.chunks(2).map(|pair| pair[0] << 4 | pair[1]);
        let pairs: Vec<u8> = pairs.collect();
        assert_eq!(unpacked(Layout::Nibbles, &pairs, [16, 6], 8), codes);
        // Rows that begin in the middle of a byte.
        let odd = unpacked(Layout::Nibbles, &pairs, [32, 3], 5);
        assert_eq!(odd, codes);
        assert_eq!(unpacked(Layout::Bytes, &codes, [16, 6], 8), codes);
        let signed: Vec<u8> = codes.iter().map(|code| code.wrapping_sub(128)).collect();
        assert_eq!(unpacked(Layout::Signed, &signed, [16, 6], 8), codes);
    }

    #[test]
    fn awq_takes_even_outputs_before_odd_ones() {
        // One input, 16 outputs: two words, each with the outputs 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on.
        let data = bytes(&[0x7531_6420, 0xfdb9_eca8]);
        let codes: Vec<u8> = (0..16).collect();
        assert_eq!(unpacked(Layout::Awq, &data, [16, 1], 8), codes);
    }

    #[test]
    fn floats_of_8_bits_are_those_of_ocp() {
        let e4m3 = Values::E4M3.table().unwrap();
        let some = [0x00, 0x01, 0x07, 0x08, 0x38, 0x7e, 0xb8].map(|i: usize| e4m3[i]);
        let step = 2f32.powi(-9);
        assert_eq!(some, [0.0, step, 7.0 * step, 8.0 * step, 1.0, 448.0, -1.0]);
        assert!(e4m3[0x7f].is_nan() && e4m3[0xff].is_nan());
        let e5m2 = Values::E5M2.table().unwrap();
        assert_eq!(
            [0x01, 0x3c, 0x7b, 0xbc].map(|i: usize| e5m2[i]),
            [2f32.powi(-16), 1.0, 57344.0, -1.0]
        );
        assert_eq!(
            (e5m2[0x7c], e8m0(127), e8m0(0)),
            (f32::INFINITY, 1.0, 2f32.powi(-127))
        );
    }

    #[test]
    fn fours_bits_of_bitsandbytes_are_16_values_in_the_unit_interval() {
        let nf4 = Values::Nf4.table().unwrap();
        assert!(nf4[..16].is_sorted() && (nf4[0], nf4[7], nf4[15]) == (-1.0, 0.0, 1.0));
        let fp4 = Values::Fp4.table().unwrap();
        assert_eq!(
            (fp4[3], fp4[6], fp4[11], fp4[14]),
            (1.0, 1.0 / 6.0, -1.0, -1.0 / 6.0)
        );
    }

    #[test]
    fn runs_follow_groups_wherever_they_end() {
        let matrix = |groups, shape| Quantised {
            kind: "",
            shape,
            codes: nothing(),
            layout: Layout::Bytes,
            values: Values::Whole,
            scales: Scales::Plain {
                part: nothing(),
                transposed: false,
                divisor: 1.0,
            },
            zeros: Zeros::Fixed(0),
            groups,
        };
        let runs = |groups, shape, row| {
            let matrix = matrix(groups, shape);
            let mut all = Vec::new();
            Open::new(&matrix, &[]).runs(row, |run, group| all.push((run, group)));
            all
        };
        let blocks = Groups::Blocks([2, 4]);
        assert_eq!(runs(blocks, [3, 6], 2), [(0..4, 2), (4..6, 3)]);
        assert_eq!(runs(Groups::Flat(4), [3, 6], 1), [(0..2, 1), (2..6, 2)]);
        let index = Groups::Index {
            of: vec![1, 0],
            count: 3,
        };
        assert_eq!(runs(index, [3, 2], 2), [(0..1, 7), (1..2, 6)]);
    }

    fn nothing() -> Part {
        Part {
            dtype: Dtype::F32,
            shape: vec![0],
            file: 0,
            bytes: 0..0,
        }
    }

    #[test]
    fn dtypes_have_the_names_and_sizes_of_safetensors() {
        for (dtype, name, size) in Dtype::ALL {
            assert_eq!(
                (Dtype::from_name(name), dtype.name(), dtype.size()),
                (Some(dtype), name, size)
            );
        }
        assert_eq!(Dtype::from_name("F64"), None);
    }
}

//! Tests of gguf.rs.

use super::*;

/// Bytes of a GGUF file, written piece by piece so that each can be made wrong.
#[derive(Clone)]
struct Writer {
    keys: Vec<(Vec<u8>, u32, Vec<u8>)>,
    tensors: Vec<(Vec<u8>, Vec<u64>, u32, u64)>,
    data: Vec<u8>,
}

fn string(s: impl AsRef<[u8]>) -> Vec<u8> {
    [&(s.as_ref().len() as u64).to_le_bytes()[..], s.as_ref()].concat()
}

fn array(type_id: u32, n: u64, elements: &[u8]) -> Vec<u8> {
    [&type_id.to_le_bytes()[..], &n.to_le_bytes(), elements].concat()
}

impl Writer {
    /// Two tensors: `a` of F32 [2, 4], `b` of Q8_0 [32].
    fn new() -> Self {
        let tensors = vec![
            (b"a".to_vec(), vec![4, 2], 0, 0),
            (b"b".to_vec(), vec![32], 8, 32),
        ];
        let keys = vec![(b"general.name".to_vec(), 8, string("tiny"))];
        Self {
            keys,
            tensors,
            data: (0..32 + 34).collect(),
        }
    }

    fn key(mut self, key: impl AsRef<[u8]>, type_id: u32, value: &[u8]) -> Self {
        self.keys
            .push((key.as_ref().to_vec(), type_id, value.to_vec()));
        self
    }

    fn tensor(mut self, name: impl AsRef<[u8]>, dims: &[u64], type_id: u32, offset: u64) -> Self {
        self.tensors
            .push((name.as_ref().to_vec(), dims.to_vec(), type_id, offset));
        self
    }

    fn write(&self) -> Vec<u8> {
        let counts = [self.tensors.len() as u64, self.keys.len() as u64].map(u64::to_le_bytes);
        let mut b = [b"GGUF", &3_u32.to_le_bytes()[..], &counts.concat()].concat();
        for (key, type_id, value) in &self.keys {
            b.extend([&string(key)[..], &type_id.to_le_bytes(), value].concat());
        }
        for (name, dims, type_id, offset) in &self.tensors {
            b.extend([&string(name)[..], &(dims.len() as u32).to_le_bytes()].concat());
            b.extend(dims.iter().flat_map(|d| d.to_le_bytes()));
            b.extend([&type_id.to_le_bytes()[..], &offset.to_le_bytes()].concat());
        }
        b.resize(b.len().next_multiple_of(32), 0);
        b.extend(&self.data);
        b
    }

    fn parse(&self) -> Result<Contents> {
        parse(&self.write(), "t.gguf")
    }

    /// Parsing must fail as [`Error::ModelFile`] with these words.
    fn refused(&self, words: &str) {
        refused(&self.write(), words);
    }
}

fn refused(bytes: &[u8], words: &str) {
    match parse(bytes, "t.gguf").unwrap_err() {
        Error::ModelFile { path, problem } => {
            assert_eq!(path, "t.gguf");
            assert!(problem.contains(words), "{problem}");
        }
        other => panic!("{other}"),
    }
}

#[test]
fn tensors_have_their_shape_outermost_first_and_their_place() {
    let bytes = Writer::new().write();
    let tensors = parse(&bytes, "t").unwrap().tensors;
    let start = bytes.len() - 66;
    assert_eq!(
        (&tensors["a"].shape[..], tensors["a"].bytes.clone()),
        (&[2, 4][..], start..start + 32)
    );
    assert_eq!(
        (&tensors["b"].shape[..], tensors["b"].bytes.clone()),
        (&[32][..], start + 32..start + 66)
    );
    assert_eq!(tensors["b"].tensor_type, TensorType::Q8_0);
}

#[test]
fn version_2_reads_like_version_3() {
    let mut bytes = Writer::new().write();
    bytes[4] = 2;
    assert_eq!(parse(&bytes, "t").unwrap().tensors.len(), 2);
}

#[test]
fn every_kind_of_metadata_is_read() {
    let w = Writer::new()
        .key("u8", 0, &[200])
        .key("i8", 1, &[200])
        .key("u16", 2, &[1, 2])
        .key("i16", 3, &[255, 255])
        .key("u32", 4, &[255; 4])
        .key("i32", 5, &[255; 4])
        .key("f32", 6, &0.5f32.to_le_bytes())
        .key("bool", 7, &[1])
        .key("u64", 10, &[255; 8])
        .key("i64", 11, &[255; 8])
        .key("f64", 12, &0.25f64.to_le_bytes())
        .key("bytes", 9, &array(0, 2, &[7, 200]))
        .key("ints", 9, &array(5, 1, &[254, 255, 255, 255]))
        .key("longs", 9, &array(10, 1, &3_u64.to_le_bytes()))
        .key("floats", 9, &array(6, 1, &1.5f32.to_le_bytes()))
        .key("doubles", 9, &array(12, 1, &2.5f64.to_le_bytes()))
        .key("bools", 9, &array(7, 2, &[0, 1]))
        .key(
            "strings",
            9,
            &array(8, 2, &[string("é"), string("")].concat()),
        );
    let mut got: Vec<_> = w.parse().unwrap().metadata.into_iter().collect();
    got.sort_by(|a, b| a.0.cmp(&b.0));
    let got: Vec<_> = got.iter().map(|(k, v)| (k.as_str(), v.clone())).collect();
    let wanted = [
        ("bool", Value::Bool(true)),
        ("bools", Value::Bools(vec![false, true])),
        ("bytes", Value::Ints(vec![7, 200])),
        ("doubles", Value::Floats(vec![2.5])),
        ("f32", Value::Float(0.5)),
        ("f64", Value::Float(0.25)),
        ("floats", Value::Floats(vec![1.5])),
        ("general.name", Value::String("tiny".into())),
        ("i16", Value::Int(-1)),
        ("i32", Value::Int(-1)),
        ("i64", Value::Int(-1)),
        ("i8", Value::Int(-56)),
        ("ints", Value::Ints(vec![-2])),
        ("longs", Value::Ints(vec![3])),
        ("strings", Value::Strings(vec!["é".into(), "".into()])),
        ("u16", Value::Int(0x201)),
        ("u32", Value::Int(u32::MAX.into())),
        ("u64", Value::UInt(u64::MAX)),
        ("u8", Value::Int(200)),
    ];
    assert_eq!(got, wanted);
}

#[test]
fn what_is_no_gguf_is_called_by_its_name() {
    refused(b"", "not a GGUF file (starts with \"\")");
    refused(
        b"PK\x03\x04 zip",
        "not a GGUF file (starts with \"PK\\x03\\x04\")",
    );
    refused(
        b"version https://git-lfs.github.com/spec/v1\noid",
        "a Git LFS pointer",
    );
    for (version, name) in [
        (1_u32.to_le_bytes(), "v1"),
        (3_u32.to_be_bytes(), "v3, big-endian"),
        ([9, 0, 0, 0], "v9"),
    ] {
        let mut bytes = Writer::new().write();
        bytes[4..8].copy_from_slice(&version);
        let error = parse(&bytes, "t").unwrap_err();
        assert!(
            matches!(&error, Error::Unsupported { what: "GGUF version", name: n, .. } if n == name),
            "{error}"
        );
    }
}

#[test]
fn counts_are_bounded_by_the_file_before_anything_is_allocated() {
    let mut bytes = Writer::new().write();
    bytes[8..16].copy_from_slice(&(1_u64 << 40).to_le_bytes());
    refused(&bytes, "says it has 1099511627776 tensors, at most ");
    bytes[8..16].copy_from_slice(&1_u64.to_le_bytes());
    bytes[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
    refused(&bytes, "says it has 18446744073709551615 keys, at most ");
    Writer::new()
        .key("k", 9, &array(8, 1 << 50, &[]))
        .refused("\"k\" says it has 1125899906842624 elements");
    Writer::new()
        .key("k", 9, &array(12, 1 << 61, &[]))
        .refused("\"k\" says it has 2305843009213693952 elements");
    Writer::new()
        .key("k", 8, &(1_u64 << 62).to_le_bytes())
        .refused("cut short: k at byte ");
    Writer::new()
        .key("k", 8, &u64::MAX.to_le_bytes())
        .refused("cut short: k at byte ");
}

#[test]
fn arrays_together_stay_under_a_cap() {
    let half = array(
        0,
        MAX_ELEMENTS as u64 / 2 + 1,
        &vec![0; MAX_ELEMENTS / 2 + 1],
    );
    Writer::new()
        .key("a", 9, &half)
        .key("b", 9, &half)
        .refused("metadata \"b\" says it has 8388609 elements");
}

#[test]
fn an_array_of_arrays_is_refused() {
    let error = Writer::new()
        .key("k", 9, &array(9, 1, &array(9, 1, &[])))
        .parse()
        .unwrap_err();
    assert_eq!(
        error.to_string().split(';').next(),
        Some("unsupported metadata \"k, an array of arrays\"")
    );
}

#[test]
fn metadata_of_an_unknown_kind_is_refused() {
    Writer::new()
        .key("k", 13, &[0; 8])
        .refused("metadata \"k\" has a type of 13");
    Writer::new()
        .key("k", 9, &array(77, 1, &[0; 8]))
        .refused("metadata \"k\" is an array of type 77");
    Writer::new()
        .key("k", 7, &[2])
        .refused("metadata \"k\" should be 0 or 1, got 2");
    Writer::new()
        .key("k", 9, &array(10, 1, &[255; 8]))
        .refused("metadata \"k\" has an element above");
}

#[test]
fn names_and_strings_are_utf_8_of_bounded_length() {
    Writer::new()
        .key([0xff], 0, &[1])
        .refused("a key is not UTF-8");
    Writer::new()
        .key("k", 8, &string([0xc3]))
        .refused("k is not UTF-8");
    Writer::new()
        .key("k", 9, &array(8, 1, &string([0xff])))
        .refused("k is not UTF-8");
    Writer::new()
        .tensor([0xff], &[1], 0, 96)
        .refused("a tensor name is not UTF-8");
    Writer::new()
        .key("", 0, &[1])
        .refused("a key should have 1 to 1024 bytes, got 0");
    Writer::new()
        .key("k".repeat(1025), 0, &[1])
        .refused("a key should have 1 to 1024 bytes, got 1025");
    Writer::new()
        .tensor("", &[1], 0, 96)
        .refused("a tensor name should have 1 to 1024 bytes, got 0");
}

#[test]
fn nothing_may_be_there_twice() {
    Writer::new()
        .key("general.name", 8, &string("x"))
        .refused("has the key \"general.name\" twice");
    let mut w = Writer::new().tensor("a", &[1], 0, 96);
    w.data.resize(128, 0);
    w.refused("has the tensor \"a\" twice");
}

#[test]
fn the_alignment_is_a_power_of_two() {
    let aligned = |n: u32| Writer::new().key("general.alignment", 4, &n.to_le_bytes());
    for bad in [0, 1, 24, 1 << 17, u32::MAX] {
        aligned(bad).refused(&format!(
            "\"general.alignment\" should be a power of two from 8 to 65536, got {bad}"
        ));
    }
    Writer::new()
        .key("general.alignment", 8, &string("32"))
        .refused("got the string \"32\"");
    aligned(16).parse().unwrap();
    aligned(64).refused("tensor \"b\" lies at 32, no multiple of 64");
}

#[test]
fn shapes_have_one_to_four_dimensions_and_whole_blocks() {
    Writer::new()
        .tensor("c", &[], 0, 96)
        .refused("tensor \"c\" has 0 dimensions, wanted 1 to 4");
    Writer::new()
        .tensor("c", &[1; 5], 0, 96)
        .refused("tensor \"c\" has 5 dimensions");
    Writer::new()
        .tensor("c", &[4, 0], 0, 96)
        .refused("tensor \"c\" is empty: its shape is [0, 4]");
    Writer::new()
        .tensor("c", &[33], 8, 96)
        .refused("rows of 33 numbers, Q8_0 wants a multiple of 32");
    Writer::new()
        .tensor("c", &[1 << 40, 1 << 40], 0, 96)
        .refused("is larger than any memory");
    Writer::new()
        .tensor("c", &[u64::MAX], 0, 96)
        .refused("is larger than any memory");
}

#[test]
fn tensors_lie_inside_the_file_and_apart() {
    Writer::new()
        .tensor("c", &[1], 0, 96)
        .refused("cut short: tensor \"c\" needs 4 bytes at ");
    Writer::new()
        .tensor("c", &[1], 0, u64::MAX - 31)
        .refused("cut short: tensor \"c\"");
    Writer::new()
        .tensor("c", &[1], 0, 1 << 40)
        .refused("cut short: tensor \"c\"");
    Writer::new()
        .tensor("c", &[1], 0, 33)
        .refused("tensor \"c\" lies at 33, no multiple of 32");
    Writer::new()
        .tensor("c", &[1], 0, 32)
        .refused("overlaps the one before it");
    let mut w = Writer::new().tensor("c", &[1], 0, 64);
    w.data.resize(96, 0);
    w.refused("tensor \"c\" overlaps the one before it");
}

#[test]
fn a_foreign_tensor_type_is_named() {
    for (id, name) in [
        (40, "NVFP4 (id 40) of c"),
        (4, "a type that GGUF has dropped (id 4) of c"),
        (99, "99"),
    ] {
        match Writer::new()
            .tensor("c", &[256], id, 96)
            .parse()
            .unwrap_err()
        {
            Error::Unsupported {
                what: "tensor type",
                name: got,
                supported,
            } => {
                assert!(got.contains(name), "{got}");
                assert!(supported.contains("Q4_K"), "{supported}");
            }
            other => panic!("{other}"),
        }
    }
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let bytes = Writer::new()
        .key("k", 9, &array(8, 1, &string("token")))
        .write();
    for n in 0..bytes.len() {
        let error = parse(&bytes[..n], "t").unwrap_err();
        assert!(
            matches!(error, Error::ModelFile { .. }),
            "{n} bytes: {error}"
        );
    }
}

#[test]
fn no_flipped_byte_leads_outside_the_file() {
    let bytes = Writer::new()
        .key("k", 9, &array(8, 1, &string("token")))
        .write();
    for i in 0..bytes.len() - 66 {
        for flip in [0x01, 0x80, 0xff] {
            let mut bad = bytes.clone();
            bad[i] ^= flip;
            if let Ok(contents) = parse(&bad, "t") {
                assert!(
                    contents.tensors.values().all(|t| t.bytes.end <= bad.len()),
                    "byte {i}"
                );
            }
        }
    }
}

#[test]
fn the_name_of_a_part_tells_its_number() {
    assert_eq!(split_name("m-00002-of-00005.gguf"), Some(("m", 2, 5)));
    assert_eq!(split_name("m-00000-of-00005.gguf"), None);
    assert_eq!(split_name("m-00006-of-00005.gguf"), None);
    assert_eq!(split_name("m-2-of-5.gguf"), None);
    assert_eq!(split_name("m-+0002-of-00005.gguf"), None);
    assert_eq!(split_name("m.gguf"), None);
}

/// One part of three: `no`, with one tensor of `name`.
fn part(no: u16, name: &str) -> Writer {
    let mut w = Writer::new()
        .key("split.no", 2, &no.to_le_bytes())
        .key("split.count", 2, &3_u16.to_le_bytes())
        .key("split.tensors.count", 5, &3_i32.to_le_bytes());
    w.tensors = vec![(name.into(), vec![8], 0, 0)];
    w
}

/// Write the files to a directory of their own, open one of them.
fn open_among(test: &str, files: &[(&str, &Writer)], name: &str) -> Result<Weights> {
    let dir = std::env::temp_dir().join(format!("hfcore-gguf-{}-{test}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    for (name, writer) in files {
        std::fs::write(dir.join(name), writer.write()).unwrap();
    }
    let weights = open(&dir.join(name));
    std::fs::remove_dir_all(&dir).unwrap();
    weights
}

const PARTS: [&str; 3] = [
    "m-00001-of-00003.gguf",
    "m-00002-of-00003.gguf",
    "m-00003-of-00003.gguf",
];

#[test]
fn any_part_opens_the_whole_split_model() {
    let parts = [
        part(0, "a"),
        part(1, "b"),
        part(2, "c").key("only.here", 0, &[1]),
    ];
    let files: Vec<_> = PARTS.into_iter().zip(&parts).collect();
    let w = open_among("split", &files, PARTS[1]).unwrap();
    assert_eq!(
        (w.files.len(), w.tensors.len(), w.total_bytes()),
        (3, 3, 96)
    );
    assert_eq!(w.tensors["c"].file, 2);
    assert_eq!(w.get_str("general.name").unwrap(), Some("tiny"));
    assert_eq!(w.metadata.get("only.here"), None);
    let numbers: Vec<f32> = (0..32_u8)
        .collect::<Vec<_>>()
        .as_chunks()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b))
        .collect();
    assert_eq!(w.require("b").unwrap().dequantize(), numbers);
}

#[test]
fn a_split_model_is_whole_and_in_order() {
    let refused = |test: &str, files: &[(&str, &Writer)], name: &str, words: &str| {
        let error = open_among(test, files, name).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    };
    let [a, b, c] = &[part(0, "a"), part(1, "b"), part(2, "c")];
    let [p1, p2, p3] = PARTS;
    refused(
        "missing",
        &[(p1, a), (p3, c)],
        p1,
        "m-00002-of-00003.gguf: part 2 of 3: No such file",
    );
    refused(
        "order",
        &[(p1, a), (p2, c), (p3, b)],
        p1,
        "\"split.no\" should be 1 in a file of this name, got 2",
    );
    refused(
        "twice",
        &[(p1, a), (p2, &part(1, "a")), (p3, c)],
        p1,
        "tensor \"a\" is in an earlier part too",
    );
    refused(
        "renamed",
        &[("m.gguf", a)],
        "m.gguf",
        "\"split.count\" should be 1 in a file of this name, got 3",
    );
    refused(
        "foreign",
        &[(p1, a), (p2, &Writer::new()), (p3, c)],
        p1,
        "\"split.count\" should be 3",
    );
    let two = part(2, "c").tensor("d", &[1], 0, 32);
    refused(
        "count",
        &[(p1, a), (p2, b), (p3, &two)],
        p1,
        "says that the model has 3 tensors, its parts hold 4",
    );
}

#[test]
fn a_model_merged_again_has_no_parts() {
    let merged = Writer::new()
        .key("split.no", 2, &[0, 0])
        .key("split.count", 2, &[0, 0]);
    assert_eq!(
        open_among("merged", &[("m.gguf", &merged)], "m.gguf")
            .unwrap()
            .tensors
            .len(),
        2
    );
}

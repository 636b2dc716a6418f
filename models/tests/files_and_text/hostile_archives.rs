//! Archives of numpy and PyTorch, and pg_gpt2's container, damaged or malicious: always a typed error, and nothing is run.

use std::io::{Cursor, Write};
use std::path::Path;

use candle_models::Error;
use candle_models::formats::{TensorSource, open_hugging_face};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use crate::golden;

fn read_all(path: &Path) -> Result<(), Error> {
    let source = open_hugging_face(path)?;
    source
        .names()
        .into_iter()
        .try_for_each(|name| source.load(name).map(drop))
}

/// What reading a file of these bytes says.
fn read(name: &str, bytes: &[u8]) -> Result<(), Error> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), r#"{"n_embd": 15}"#).unwrap();
    std::fs::write(folder.path().join(name), bytes).unwrap();
    read_all(&folder.path().join(name))
}

fn assert_refused(name: &str, bytes: &[u8], expected: &str) {
    match read(name, bytes) {
        Err(error @ (Error::InvalidFile { .. } | Error::Unsupported(_))) => {
            let message = error.to_string();
            assert!(message.contains(expected), "{message}, not {expected}");
        }
        other => panic!("{other:?}, not {expected}"),
    }
}

/// A zip archive of stored members.
fn archive(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    for (name, bytes) in members {
        writer.start_file(*name, options).unwrap();
        writer.write_all(bytes).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

fn npy(literal: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend_from_slice(&(literal.len() as u16).to_le_bytes());
    bytes.extend_from_slice(literal.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

fn array(descr: &str, shape: &str, data: &[u8]) -> Vec<u8> {
    let literal = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
    npy(&literal, data)
}

#[test]
fn bad_arrays_are_refused_by_name() {
    let one = |bytes: Vec<u8>| archive(&[("t.npy", &bytes)]);
    let good = array("<f4", "(2,)", &[0; 8]);
    for (bytes, expected) in [
        (
            one(array("<f4", "(3,)", &[0; 8])),
            "tensor t of shape [3] does not fit the 8 bytes",
        ),
        (one(array("<f4", "(1,)", &[0; 8])), "does not fit"),
        (
            one(array(">f4", "(2,)", &[0; 8])),
            "tensor t: its numbers are big-endian",
        ),
        (one(array("<i4", "(2,)", &[0; 8])), "tensor t"),
        (one(array("|O", "(2,)", &[0; 8])), "stored as |O"),
        (
            one(array("<f4", "(4294967296, 4294967296)", &[0; 8])),
            "impossible shape",
        ),
        (one(npy("{", &[])), "tensor t"),
        (one(npy("__import__('os').system('false')", &[])), "tensor t"),
        (one(b"\x93NUMPY\x01\x00".to_vec()), "truncated or damaged"),
        (one(b"not numpy".to_vec()), "tensor t: it is no numpy array"),
        (one(array("<f4", "(2,)", &[0xff; 8])), "tensor t holds NaN"),
        (
            one(array("<f8", "(1,)", &1e300f64.to_le_bytes())),
            "tensor t holds NaN or infinity",
        ),
        (
            archive(&[("wte.weight.npy", &good), ("transformer.wte.weight.npy", &good)]),
            "there twice",
        ),
        (
            archive(&[("t.npy", &good), ("image.png", &[0xff, 0xfe])]),
            "image.png in the archive is neither",
        ),
    ] {
        assert_refused("w.npz", &bytes, expected);
    }
    assert!(read("w.npz", &one(good)).is_ok());
}

#[test]
fn bad_archives_are_refused() {
    let data = array("<f4", "(200,)", &[0; 800]);
    let whole = archive(&[("t.npy", &data), ("u.npy", &data)]);
    assert!(read("w.npz", &whole).is_ok());
    for length in (0..whole.len()).step_by(7) {
        assert!(read("w.npz", &whole[..length]).is_err(), "{length} bytes");
    }
    // A changed number: the checksum tells. The local header of the second member is as long as the first's.
    let mut changed = whole.clone();
    let at = changed.windows(8).position(|window| window == [0; 8]).unwrap() + 100;
    changed[at + 100] = 1;
    assert_refused("w.npz", &changed, "its CRC-32 differs");
    // The second member under the first one's name, in both of its headers.
    let renamed: Vec<u8> = whole
        .iter()
        .map(|byte| if *byte == b'u' { b't' } else { *byte })
        .collect();
    assert!(read("w.npz", &renamed).is_err());
    // A member that declares more than its bytes can be: in the central directory, sizes follow the checksum.
    let mut larger = whole.clone();
    let central = larger.windows(4).rposition(|window| window == b"PK\x01\x02").unwrap();
    larger[central + 24..central + 28].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    assert!(read("w.npz", &larger).is_err());
    // A method that nobody knows.
    let mut method = whole;
    method[central + 10] = 99;
    assert!(read("w.npz", &method).is_err());
}

#[test]
fn a_zip_bomb_is_refused_before_it_is_inflated() {
    let bomb = std::fs::read(golden("formats/gpt2.npz")).unwrap();
    let central = bomb.windows(4).position(|window| window == b"PK\x01\x02").unwrap();
    let mut larger = bomb.clone();
    larger[central + 24..central + 28].copy_from_slice(&0x7fff_0000u32.to_le_bytes());
    assert_refused("w.npz", &larger, "declares 2147418112 bytes");
}

/// A pickle in an archive of PyTorch's form.
fn torch(program: &[u8], storage: &[u8]) -> Vec<u8> {
    archive(&[
        ("m/data.pkl", program),
        ("m/byteorder", b"little"),
        ("m/data/0", storage),
    ])
}

/// A program that makes `{'t': tensor}` of these arguments of a storage of 6 numbers.
fn program(offset: u8, shape: &[u8], strides: &[u8]) -> Vec<u8> {
    let tuple = |sizes: &[u8]| {
        let items: Vec<u8> = sizes.iter().flat_map(|size| [b'K', *size]).collect();
        [b"(", items.as_slice(), b"t"].concat()
    };
    let storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQ";
    let arguments = [&[b'K', offset], tuple(shape).as_slice(), &tuple(strides)].concat();
    [
        b"\x80\x02}X\x01\x00\x00\x00tctorch._utils\n_rebuild_tensor_v2\n(".as_slice(),
        storage,
        &arguments,
        b"\x89ccollections\nOrderedDict\n)RtRs.",
    ]
    .concat()
}

#[test]
fn pickles_that_ask_for_more_than_tensors_are_refused_and_not_run() {
    let marker = std::env::temp_dir().join(format!("candle-pickle-{}", std::process::id()));
    let command = format!("touch {}", marker.display());
    let length = (command.len() as u32).to_le_bytes();
    let system = |module: &str| {
        let call = format!("c{module}\nsystem\n(X");
        [
            b"\x80\x02".as_slice(),
            call.as_bytes(),
            &length,
            command.as_bytes(),
            b"tR.",
        ]
        .concat()
    };
    let cases: [(Vec<u8>, &str); 12] = [
        (system("os"), "os.system"),
        (system("posix"), "posix.system"),
        (b"\x80\x02cbuiltins\neval\n.".to_vec(), "builtins.eval"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93.".to_vec(), "builtins.exec"),
        (b"\x80\x02ctorch\nload\n.".to_vec(), "torch.load"),
        (
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n.".to_vec(),
            "no dictionary of tensors",
        ),
        (
            b"\x80\x02ccollections\nOrderedDict\n(K\x01tR.".to_vec(),
            "unknown arguments",
        ),
        (b"\x80\x02ios\nsystem\n.".to_vec(), "pickle instruction 0x69"),
        (b"\x80\x02}\x81.".to_vec(), "pickle instruction 0x81"),
        (b"\x80\x02K\x01.".to_vec(), "it holds an integer"),
        (
            b"\x80\x02}X\x01\x00\x00\x00tK\x01s.".to_vec(),
            "its entry t is an integer",
        ),
        (b"\x80\x00".to_vec(), "pickle protocol 0"),
    ];
    for (program, expected) in cases {
        assert_refused("w.bin", &torch(&program, &[]), expected);
    }
    assert!(!marker.exists());
}

#[test]
fn tensors_outside_of_their_storage_are_refused() {
    let storage = [0u8; 24];
    assert!(read("w.bin", &torch(&program(0, &[2, 3], &[3, 1]), &storage)).is_ok());
    assert!(read("w.bin", &torch(&program(0, &[3, 2], &[1, 3]), &storage)).is_ok());
    assert!(read("w.bin", &torch(&program(0, &[], &[]), &storage)).is_ok());
    for (bytes, expected) in [
        (
            torch(&program(1, &[2, 3], &[3, 1]), &storage),
            "tensor t: it reaches to element 7 of a storage of 6",
        ),
        (
            torch(&program(0, &[2, 3], &[6, 1]), &storage),
            "tensor t: it reaches to element 9",
        ),
        (
            torch(&program(0, &[2, 6], &[0, 1]), &storage),
            "tensor t: its strides repeat elements",
        ),
        (torch(&program(0, &[2, 3], &[1]), &storage), "unknown arguments"),
        (
            torch(&program(0, &[6], &[1]), &[0; 20]),
            "tensor t: its storage of 6 float32 has 20 bytes",
        ),
        (
            archive(&[("m/data.pkl", &program(0, &[6], &[1]))]),
            "its storage data/0 is not in the archive",
        ),
        (
            archive(&[("m/data.pkl", b"."), ("m/byteorder", b"big")]),
            "byte order is \"big\"",
        ),
        (b"\x80\x02\x8a\x0a".repeat(8), "PyTorch before 1.6"),
    ] {
        assert_refused("w.bin", &bytes, expected);
    }
}

#[test]
fn bad_containers_of_pg_gpt2_are_refused() {
    let whole = std::fs::read(golden("formats/pg_gpt2-converted.npz")).unwrap();
    assert!(read("w.npz", &whole).is_ok());
    for length in (0..whole.len()).step_by(1009) {
        assert!(read("w.npz", &whole[..length]).is_err(), "{length} bytes");
    }
    assert_refused("w.npz", &[whole.clone(), vec![0]].concat(), "something follows");
    let mut trailer = whole.clone();
    trailer[whole.len() - 8] ^= 1;
    assert_refused("w.npz", &trailer, "its checksum or length differs");
}

#[test]
fn flipped_bits_never_panic() {
    let mut random = ChaCha8Rng::seed_from_u64(14);
    for file in ["gpt2.npz", "gpt2.bin", "pg_gpt2-exported.npz", "qwen2-bf16.bin"] {
        let whole = std::fs::read(golden("formats").join(file)).unwrap();
        for round in 0..200 {
            let mut damaged = whole.clone();
            // The directory of an archive is at its end.
            let range = if round % 2 == 0 {
                0..whole.len()
            } else {
                whole.len() - 1500..whole.len()
            };
            for _ in 0..random.random_range(1..4) {
                damaged[random.random_range(range.clone())] ^= 1 << random.random_range(0..8);
            }
            match read(file, &damaged) {
                Ok(()) | Err(Error::InvalidFile { .. } | Error::Unsupported(_)) => {}
                Err(other) => panic!("{file}: {other:?}"),
            }
        }
    }
}

//! Devices, and the program with CUDA beside the plain one.

use std::path::{Path, PathBuf};
use std::process::Command;

use candle_compute_proto::v1::*;
use tonic::Code;

use crate::support::{Client, PROGRAM, TestServer, assert_status, command_of};

/// A server whose program lies in a folder of its own, beside a `compute-server-cuda` with that text if there is one.
/// Everything is written by other processes: one of ours with the file open for writing could not be forked.
fn server_beside(folder: &Path, cuda: Option<&str>) -> TestServer {
    let program: PathBuf = folder.join("compute-server");
    let script = "ln \"$1\" \"$2\" 2>/dev/null || cp \"$1\" \"$2\"";
    let shell = |script: &str, arguments: [&str; 2]| {
        let done = Command::new("sh").args(["-c", script, "sh"]).args(arguments).status();
        assert!(done.unwrap().success());
    };
    shell(script, [PROGRAM, program.to_str().unwrap()]);
    if let Some(text) = cuda {
        let path = folder.join("compute-server-cuda");
        shell(
            "printf '%s' \"$1\" > \"$2\" && chmod +x \"$2\"",
            [text, path.to_str().unwrap()],
        );
    }
    let data = tempfile::tempdir().unwrap();
    TestServer::spawn(&mut command_of(&program, data.path()), data)
}

async fn devices(client: &Client) -> Vec<Device> {
    let listed = client.telemetry.clone().list_devices(ListDevicesRequest {}).await;
    listed.unwrap().into_inner().devices
}

#[tokio::test]
async fn devices_are_listed_with_the_reason_that_there_is_no_gpu() {
    let folder = tempfile::tempdir().unwrap();
    let server = server_beside(folder.path(), None);
    let client = server.connect().await;
    client.create("m").await;
    let [cpu, gpu] = devices(&client).await.try_into().unwrap();
    assert_eq!((cpu.name.as_str(), cpu.threads, cpu.available), ("cpu", 1, true));
    assert!(cpu.memory_used_bytes > 0 && !cpu.simd.is_empty());
    assert_eq!((gpu.name.as_str(), gpu.available), ("cuda:0", false));
    assert!(gpu.reason.contains("cpu only"), "{}", gpu.reason);
}

#[tokio::test]
async fn a_program_with_cuda_that_cannot_start_leaves_the_work_to_the_plain_one() {
    let folder = tempfile::tempdir().unwrap();
    let error = "error while loading shared libraries: libcuda.so.1: cannot open shared object file";
    let server = server_beside(
        folder.path(),
        Some(&format!("#!/bin/sh\necho '{error}' >&2\nexit 127\n")),
    );
    let client = server.connect().await;
    let [_, gpu] = devices(&client).await.try_into().unwrap();
    assert!(!gpu.available && gpu.reason.contains(error), "{}", gpu.reason);
    let request = LoadModelRequest {
        name: "m".into(),
        source: "m".into(),
        device: "cuda:0".into(),
        ..Default::default()
    };
    let message = assert_status(client.load(request).await, Code::Unimplemented, "0A000");
    assert!(
        message.contains("cuda:0") && message.contains("libcuda.so.1"),
        "{message}"
    );
    client.create("m").await;
}

#[tokio::test]
async fn a_program_with_cuda_that_starts_takes_over() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("arguments");
    let script = format!(
        "#!/bin/sh\necho \"$@\" >> '{}'\n[ \"$1\" = --version ] || exec '{PROGRAM}' \"$@\"\n",
        log.display()
    );
    let server = server_beside(folder.path(), Some(&script));
    server.connect().await.create("m").await;
    let arguments = std::fs::read_to_string(log).unwrap();
    let lines: Vec<&str> = arguments.lines().collect();
    assert_eq!(lines.len(), 2, "{arguments}");
    assert_eq!(lines[0], "--version");
    assert!(lines[1].starts_with("serve --listen 127.0.0.1:0"), "{arguments}");
}

//! SIGKILL at every change of files that saving a checkpoint makes, one after the other: nothing committed is lost,
//! nothing half-written is listed, and what was under way leaves nothing behind.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use candle_compute_proto::v1::*;
use tempfile::TempDir;

use crate::durability::{Committed, small};
use crate::support::{Client, TestServer, command};

const A: &[i64] = &[1, 2, 3, 4, 5, 6];
const B: &[i64] = &[9, 8, 7, 6, 5];

/// The library that kills; cargo has put it where this program is.
fn library() -> PathBuf {
    let path = std::env::current_exe().unwrap().with_file_name("libkill_points.so");
    assert!(path.exists(), "{}", path.display());
    path
}

/// A copy of a data folder in which files that share their bytes do so, too.
fn copy(data: &Path) -> TempDir {
    let to = tempfile::tempdir().unwrap();
    let copied = Command::new("cp").arg("-a").arg(data.join(".")).arg(to.path()).status();
    assert!(copied.unwrap().success());
    to
}

/// The names in a folder; none where there is no folder.
fn names(folder: PathBuf) -> BTreeSet<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// What must not change.
#[derive(Debug, PartialEq)]
struct State {
    committed: Committed,
    /// Digest of the model at each step that has a checkpoint.
    digest: String,
}

async fn digest(client: &Client, model: &str) -> String {
    let request = DigestModelRequest {
        model: model.into(),
        ..Default::default()
    };
    client
        .models
        .clone()
        .digest_model(request)
        .await
        .unwrap()
        .into_inner()
        .sha256
}

async fn state(client: &Client) -> State {
    State {
        committed: client.committed("m").await,
        digest: digest(client, "m").await,
    }
}

/// A data folder with a model that has a checkpoint of step 1 and keeps one, has taken another step since, and has a
/// gradient. Returns what is committed, and the digests at both steps.
async fn prepared() -> (TempDir, State, [String; 2]) {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.load(small("m")).await.unwrap();
    client
        .configure(None, "m", r#"{"keep_last": 1, "keep_tagged": false}"#)
        .await;
    let mut digests = Vec::new();
    for step in 1..=2 {
        client.batch("m", None, &[A, B]).await.unwrap();
        client.step("m", None).await.unwrap();
        digests.push(digest(&client, "m").await);
        if step == 1 {
            client.checkpoint("m", None).await.unwrap();
        }
    }
    client.batch("m", None, &[B]).await.unwrap();
    let state = state(&client).await;
    (server.kill(), state, digests.try_into().unwrap())
}

/// Saves a checkpoint on a server that is killed at change `at` of its files: what it was killed at, unless the save came
/// to its end, and the data folder.
async fn save_and_die(data: TempDir, at: u64) -> (Option<String>, TempDir) {
    let armed = tempfile::tempdir().unwrap();
    let mut command = command(data.path());
    command
        .env("LD_PRELOAD", library())
        .env("KILL_POINTS_FOLDER", data.path().canonicalize().unwrap())
        .env("KILL_POINTS_ARMED", armed.path().join("armed"))
        .env("KILL_POINTS_AT", at.to_string())
        .stderr(Stdio::piped());
    let server = TestServer::spawn(&mut command, data);
    let client = server.connect().await;
    std::fs::write(armed.path().join("armed"), "").unwrap();
    if client.checkpoint("m", None).await.is_ok() {
        return (None, server.kill());
    }
    let (errors, data) = server.errors();
    let at = errors.lines().find_map(|line| line.strip_prefix("killed at "));
    (Some(at.unwrap_or_else(|| panic!("{errors}")).to_owned()), data)
}

/// Restarts a server and looks at everything. `saved` says that the checkpoint was answered.
async fn check(data: TempDir, (expected, digests): (&State, &[String; 2]), saved: bool) {
    let server = TestServer::start_in(data, &[]);
    let client = server.connect().await;
    assert_eq!(state(&client).await, *expected);
    let listed: Vec<u64> = client.list_checkpoints(None).await.iter().map(|row| row.step).collect();
    // Saving the new one and removing the old one are one transaction.
    assert!(listed == [2] || (listed == [1] && !saved), "{listed:?}");
    let folder = server.data.path();
    assert_eq!(names(folder.join("staging")), BTreeSet::new());
    let steps = names(folder.join("checkpoints/m"));
    let steps: Vec<_> = steps.iter().filter(|name| name.parse::<u64>().is_ok()).collect();
    assert_eq!(steps, [&listed[0].to_string()]);
    assert!(names(folder.join("commits/bases")).len() <= 1);
    let restored = LoadModelRequest {
        name: "restored".into(),
        source: format!("checkpoint://m/{}", listed[0]),
        ..Default::default()
    };
    client.load(restored).await.unwrap();
    assert_eq!(digest(&client, "restored").await, digests[listed[0] as usize - 1]);
    if listed == [1] {
        client.checkpoint("m", None).await.unwrap();
        assert_eq!(client.list_checkpoints(None).await[0].step, 2);
    }
}

#[tokio::test]
async fn a_checkpoint_is_whole_or_not_there_wherever_its_save_is_killed() {
    let (prepared, expected, digests) = prepared().await;
    let mut kinds = BTreeSet::new();
    for at in 1.. {
        let (killed_at, data) = save_and_die(copy(prepared.path()), at).await;
        println!("{at}: {killed_at:?}");
        check(data, (&expected, &digests), killed_at.is_none()).await;
        match killed_at {
            Some(kind) => kinds.insert(kind),
            None => break,
        };
    }
    for kind in ["open", "write", "fsync", "mkdir", "rename"] {
        assert!(kinds.contains(kind), "never killed at {kind}: {kinds:?}");
    }
}

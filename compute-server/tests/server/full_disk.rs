//! A data folder on a file system that is full: clear errors, nothing half-written, and the server goes on.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use tonic::Code;

use crate::durability::small;
use crate::support::{TestServer, assert_status};

/// A small file system in memory.
struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    /// None where mounting is not permitted.
    fn mount(path: &Path) -> Option<Self> {
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=3m", "tmpfs"])
            .arg(path)
            .output();
        mounted
            .is_ok_and(|output| output.status.success())
            .then(|| Self { path: path.to_owned() })
    }

    /// Takes all space that is left.
    fn fill(&self) {
        let mut file = std::fs::File::create(self.path.join("filler")).unwrap();
        while file.write_all(&[0; 1 << 10]).is_ok() {}
    }

    fn free(&self) {
        std::fs::remove_file(self.path.join("filler")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
        let _ = std::fs::remove_dir(&self.path);
    }
}

#[tokio::test]
async fn a_full_disk_refuses_commits_and_checkpoints_and_loses_nothing() {
    let data = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount(data.path()) else {
        eprintln!("skipped: mounting a tmpfs is not permitted here");
        return;
    };
    let server = TestServer::start_in(data, &[]);
    let client = server.connect().await;
    client.load(small("m")).await.unwrap();
    client.batch("m", None, &[&[1, 2, 3]]).await.unwrap();
    client.step("m", None).await.unwrap();
    let before = client.committed("m").await;
    disk.fill();
    // More than fits into what is left of the log's last page.
    let long: Vec<i64> = (0..60).map(|token| 200 + token).collect();
    let rows = [long.as_slice(); 60];
    let message = assert_status(client.batch("m", None, &rows).await, Code::ResourceExhausted, "53100");
    assert!(message.contains("commit log"), "{message}");
    assert_status(client.checkpoint("m", None).await, Code::ResourceExhausted, "53100");
    assert!(client.list_checkpoints(None).await.is_empty());
    assert_eq!(
        std::fs::read_dir(server.data.path().join("staging")).unwrap().count(),
        0
    );
    assert_eq!(client.committed("m").await, before);
    // What writes nothing still works.
    client.score("m").await;

    disk.free();
    client.batch("m", None, &rows).await.unwrap();
    client.step("m", None).await.unwrap();
    client.checkpoint("m", None).await.unwrap();
    let before = client.committed("m").await;
    let server = TestServer::start_in(server.kill(), &[]);
    let client = server.connect().await;
    assert_eq!(client.committed("m").await, before);
    assert_eq!(client.list_checkpoints(None).await.len(), 1);
    drop(client);
    drop(server);
    drop(disk);
}

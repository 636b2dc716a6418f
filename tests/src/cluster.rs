//! A private Postgres cluster that all tests of one program share.

use std::fs;
use std::io::{Seek as _, Write as _};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};

use postgres::{Client, Config, NoTls};

/// Name of the superuser of the cluster.
pub const SUPERUSER: &str = "postgres";

/// A running cluster that listens on a Unix socket only.
#[derive(Debug)]
pub struct Cluster {
    /// Holds the data folder, the sockets and the log.
    folder: PathBuf,
    /// Stops the cluster and removes its data when this program ends, however it ends: its standard input closes then.
    _guardian: Mutex<Child>,
}

impl Cluster {
    /// The cluster of this test program, started on first use.
    pub fn shared() -> &'static Self {
        static CLUSTER: OnceLock<Cluster> = OnceLock::new();
        CLUSTER.get_or_init(Self::start)
    }

    fn start() -> Self {
        let programs = postgres_programs();
        let folder = crate::state_folder().join(format!("cluster-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("the state folder can be written");
        if runs_as_root() {
            let status = Command::new("chown").arg("postgres").arg(&folder).status();
            assert!(status.is_ok_and(|status| status.success()), "user postgres exists");
        }
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).expect("the folder is ours");
        let data = folder.join("data");
        run(as_postgres(&programs.join("initdb"))
            .args([
                "--no-sync",
                "--no-instructions",
                "--auth=trust",
                "--encoding=UTF8",
                "--locale=C.UTF-8",
            ])
            .arg(format!("--username={SUPERUSER}"))
            .arg("-D")
            .arg(&data));
        // Durability of Postgres itself is not under test; a crash of a backend must show, so restart_after_crash is off.
        let settings = format!(
            "-c listen_addresses='' -c unix_socket_directories='{}' -c fsync=off -c max_connections=200 -c max_prepared_transactions=4 \
             -c restart_after_crash=off -c log_min_messages=warning -c timezone=UTC",
            folder.display()
        );
        run(as_postgres(&programs.join("pg_ctl"))
            .args(["--wait", "--silent", "-D"])
            .arg(&data)
            .arg("-l")
            .arg(folder.join("log"))
            .arg("-o")
            .arg(settings)
            .arg("start"));
        let guardian = guardian(&programs, &folder, &data);
        Self {
            folder,
            _guardian: Mutex::new(guardian),
        }
    }

    /// Connects to a database as the superuser.
    ///
    /// # Panics
    /// When the cluster does not answer, as after a crash of a backend; its log is shown.
    #[must_use]
    pub fn connect(&self, database: &str) -> Client {
        self.connect_as(database, SUPERUSER)
            .unwrap_or_else(|error| panic!("{error}\n{}", self.log()))
    }

    /// Connects to a database as a user.
    ///
    /// # Errors
    /// What Postgres refused the connection with.
    pub fn connect_as(&self, database: &str, user: &str) -> Result<Client, postgres::Error> {
        Config::new()
            .host_path(&self.folder)
            .port(5432)
            .user(user)
            .dbname(database)
            .connect(NoTls)
    }

    /// Makes an empty database with a name of its own.
    #[must_use]
    pub fn create_database(&self) -> String {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("test_{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        // Two sessions cannot copy the template at once.
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let created = self
            .connect(SUPERUSER)
            .batch_execute(&format!("CREATE DATABASE {name}"));
        created.expect("a database can be created");
        name
    }

    /// What pg_dump writes of a database.
    ///
    /// # Panics
    /// When it fails.
    #[must_use]
    pub fn dump(&self, database: &str) -> Vec<u8> {
        let output = self.client_program("pg_dump").arg(database).output();
        let output = output.expect("pg_dump can be run");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "pg_dump: {errors}");
        output.stdout
    }

    /// Runs what [`dump`](Self::dump) gave in another database.
    ///
    /// # Panics
    /// At the first statement that fails.
    pub fn restore(&self, database: &str, dump: &[u8]) {
        let mut file = tempfile::tempfile().expect("a temporary file can be made");
        file.write_all(dump)
            .and_then(|()| file.rewind())
            .expect("it can be written");
        let mut psql = self.client_program("psql");
        psql.args([
            "--quiet",
            "--no-psqlrc",
            "--set",
            "ON_ERROR_STOP=1",
            "--dbname",
            database,
        ]);
        let output = psql.stdin(file).output().expect("psql can be run");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "psql: {errors}");
    }

    fn client_program(&self, name: &str) -> Command {
        let mut command = Command::new(postgres_programs().join(name));
        command.arg("--host").arg(&self.folder);
        command.args(["--port", "5432", "--username", SUPERUSER]);
        command
    }

    /// The server's log so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).unwrap_or_else(|error| format!("no log: {error}"))
    }

    /// Asserts that no backend crashed so far.
    ///
    /// # Panics
    /// When one did.
    pub fn assert_no_crash(&self) {
        let log = self.log();
        let crash = log
            .lines()
            .find(|line| line.contains("was terminated by signal") || line.contains("PANIC:"));
        assert_eq!(crash, None, "a backend crashed:\n{log}");
    }
}

/// Starts a shell that waits for this program's end, then stops the cluster.
fn guardian(programs: &Path, folder: &Path, data: &Path) -> Child {
    let script = "cat >/dev/null; \"$0\" stop --silent -m immediate -D \"$1\"; rm -rf \"$2\"/data";
    as_postgres(Path::new("/bin/sh"))
        .arg("-c")
        .arg(script)
        .arg(programs.join("pg_ctl"))
        .arg(data)
        .arg(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("a shell can be started")
}

/// The folder with `initdb` and `pg_ctl` of the Postgres that has the extension.
fn postgres_programs() -> PathBuf {
    std::env::var_os("CANDLE_TEST_POSTGRES").map_or_else(|| PathBuf::from("/usr/lib/postgresql/15/bin"), PathBuf::from)
}

fn runs_as_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}

/// A command that runs as user postgres when this program runs as root, which Postgres refuses.
fn as_postgres(program: &Path) -> Command {
    let mut command;
    if runs_as_root() {
        command = Command::new("runuser");
        command.args(["-u", "postgres", "--"]).arg(program);
    } else {
        command = Command::new(program);
    }
    command.current_dir("/");
    command
}

fn run(command: &mut Command) {
    // pg_ctl's child keeps the output open: a pipe would never end.
    let log = tempfile::tempfile().expect("a temporary file can be made");
    let output = log.try_clone().expect("a file can be shared");
    let status = command.stdin(Stdio::null()).stdout(output).stderr(log).status();
    assert!(
        status.as_ref().is_ok_and(std::process::ExitStatus::success),
        "{command:?}: {status:?}"
    );
}

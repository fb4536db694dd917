"""One hospital in files, DuckDB, PostgreSQL and Spark: the same samples and series from each."""

import contextlib
import gzip
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import duckdb
import ibis
import pytest

from clinfuse.conventions import PUBLISHED, SAFE, InputError
from clinfuse.data.channels import channel_items
from clinfuse.data.databases import EVENT_TABLES, travelling_rows
from clinfuse.data.extracts import EXTRACTED, extract_source
from clinfuse.data.source_check import check_source
from clinfuse.data.sources import EXTRA_TABLES, TABLES, open_source
from clinfuse.data.tasks import mortality_task
from clinfuse.ward.synthetic_ward import write_ward

ITEMS = sorted(set(channel_items(SAFE)) | set(channel_items(PUBLISHED)))
PASSWORD = "s3cr@t/word"
KINDS = {"BIGINT": "INTEGER", "DOUBLE": "FLOAT", "VARCHAR": "VARCHAR(200)"}  # as in mimic-code
each_protocol = pytest.mark.parametrize("protocol", [SAFE, PUBLISHED], ids=lambda p: p.name)


@pytest.fixture(scope="module")
def ward(tmp_path_factory):
    """A small ward in files."""
    folder = tmp_path_factory.mktemp("engines") / "ward"
    write_ward(folder, 120, seed=3, images=False, quiet=True)
    return open_source(folder)


def column_kinds(name, header, kinds):
    """The types under which mimic-code creates a table."""
    declared = (TABLES | EXTRA_TABLES).get(name, {})
    found = {column: kinds.get(declared.get(column), "TEXT") for column in header}
    timed = {column: "TIMESTAMP" for column in header if declared.get(column) == "TIMESTAMP"}
    long = {column: "TEXT" for column in header if column in ("text", "long_title")}
    return found | timed | long


def header_of(file):
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt") as lines:
        return next(lines).strip().split(",")


def load_duckdb(source, file, rename=lambda room, table: (f"mimiciv_{room}", table)):
    """Write the tables of a source into a file of DuckDB, with the types that it guesses."""
    with duckdb.connect(str(file)) as database:
        for name, path in source.files.items():
            schema, table = rename(*name.split("/"))
            database.execute(f"CREATE SCHEMA IF NOT EXISTS {schema}")
            database.execute(
                f"CREATE TABLE {schema}.{table} AS FROM read_csv('{path}', sample_size = -1)"
            )
    return f"duckdb://{file}"


@pytest.fixture(scope="module")
def postgres_server():
    """A private server of PostgreSQL: how to become its owner, its port."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("PostgreSQL is not installed")
    pytest.importorskip("psycopg")
    folder = Path(tempfile.mkdtemp(prefix="clinfuse-postgres-"))
    become: list[str] = []
    if os.getuid() == 0:
        try:
            owner = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        become = ["runuser", "-u", "postgres", "--"]
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o644)
    data = folder / "data"
    programs = found[-1].parent
    asked = [programs / "initdb", "-D", data, "-U", "owner", "-A", "scram-sha-256", "-N"]
    asked += ["--pwfile", folder / "password", "--no-locale", "-E", "UTF8"]
    subprocess.run([*become, *map(str, asked)], check=True, capture_output=True, cwd="/")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"-p {port} -k '' -c listen_addresses=127.0.0.1 -c fsync=off -c shared_buffers=32MB"
    control = [*become, str(programs / "pg_ctl"), "-D", str(data)]
    start = [*control, "-o", options, "-l", str(folder / "log"), "-w", "start"]
    subprocess.run(start, check=True, capture_output=True, cwd="/")
    yield port
    subprocess.run([*control, "-m", "immediate", "stop"], capture_output=True, cwd="/")
    shutil.rmtree(folder, ignore_errors=True)


def address(port, database, user="owner", password=PASSWORD):
    return f"postgres://{user}:{password}@127.0.0.1:{port}/{database}"


def connect_postgres(port, database):
    import psycopg

    given = {"host": "127.0.0.1", "port": port, "user": "owner", "password": PASSWORD}
    return psycopg.connect(**given, dbname=database, autocommit=True)


def load_postgres(source, port, database):
    """Write the tables of a source into a database of PostgreSQL, as mimic-code does."""
    with connect_postgres(port, "postgres") as server:
        server.execute(f"CREATE DATABASE {database}")
    with connect_postgres(port, database) as server:
        for name, path in source.files.items():
            room, table = name.split("/")
            header = header_of(path)
            kinds = column_kinds(name, header, KINDS)
            if name == "hosp/patients":
                kinds["dod"] = "DATE"
            columns = ", ".join(f"{column} {kind}" for column, kind in kinds.items())
            server.execute(f"CREATE SCHEMA IF NOT EXISTS mimiciv_{room}")
            server.execute(f"CREATE TABLE mimiciv_{room}.{table} ({columns})")
            copy = f"COPY mimiciv_{room}.{table} FROM STDIN (FORMAT csv, HEADER)"
            rows = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            with server.cursor() as cursor, cursor.copy(copy) as copied:
                copied.write(rows)
    return address(port, database)


@pytest.fixture(scope="module")
def spark_session(tmp_path_factory):
    """A local session of Spark that is far from Greenwich."""
    sql = pytest.importorskip("pyspark.sql")
    if shutil.which("java") is None:
        pytest.skip("there is no Java for Spark")
    folder = tmp_path_factory.mktemp("spark")
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = sql.SparkSession.builder.master("local[2]").appName("clinfuse")
    settings = {
        "spark.driver.memory": "1g",
        "spark.ui.enabled": "false",
        "spark.sql.shuffle.partitions": "2",
        "spark.sql.session.timeZone": "-05:00",
        "spark.sql.warehouse.dir": str(folder),
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.host": "127.0.0.1",
    }
    for key, value in settings.items():
        builder = builder.config(key, value)
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    yield session
    session.stop()


def load_spark(source, session):
    """Name the files of a source as tables of a session."""
    kinds = {"BIGINT": "INT", "DOUBLE": "DOUBLE", "VARCHAR": "STRING"}
    for name, path in source.files.items():
        room, table = name.split("/")
        found = column_kinds(name, header_of(path), kinds)
        columns = ", ".join(f"{c} {k.replace('TEXT', 'STRING')}" for c, k in found.items())
        options = f"header 'true', escape '\"', multiLine 'true', path '{path}'"
        session.sql(f"CREATE DATABASE IF NOT EXISTS mimiciv_{room}")
        session.sql(
            f"CREATE TABLE mimiciv_{room}.{table} ({columns}) USING csv OPTIONS ({options})"
        )
    return session


@pytest.fixture(scope="module", params=["duckdb", "postgres", "spark"])
def database(request, ward, tmp_path_factory):
    """The ward in every engine: what `open_source` is given."""
    if request.param == "duckdb":
        return load_duckdb(ward, tmp_path_factory.mktemp("duckdb") / "ward.duckdb")
    if request.param == "postgres":
        return load_postgres(ward, request.getfixturevalue("postgres_server"), "ward")
    return load_spark(ward, request.getfixturevalue("spark_session"))


def task_of(source, protocol, cache):
    return mortality_task(extract_source(source, cache, ITEMS, quiet=True), protocol)


def assert_same(task, expected):
    assert task.samples.equals(expected.samples)
    assert task.series.tobytes() == expected.series.tobytes()
    assert task.events.equals(expected.events)
    assert task.attrition.equals(expected.attrition)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("extracts")


@each_protocol
def test_every_engine_gives_the_same_task(ward, database, cache, protocol):
    source = open_source(database)
    assert (source.kind, source.version) == ("mimic-iv", ward.version)
    expected = mortality_task(ward, protocol)
    assert len(expected.samples) > 50
    assert_same(task_of(source, protocol, cache), expected)
    assert_same(task_of(ward, protocol, cache), expected)


def test_every_engine_extracts_the_same_rows(ward, database, cache):
    tables = []
    for source in (ward, open_source(database)):
        extract = extract_source(source, cache, ITEMS, quiet=True)
        read = "SELECT DISTINCT * FROM read_parquet('{}') ORDER BY ALL"
        tables.append(
            {
                n: duckdb.sql(read.format(extract.files[n])).df()
                for n in EXTRACTED
                if n in extract.files
            }
        )
    assert tables[0].keys() == tables[1].keys() >= set(TABLES)
    for name, rows in tables[0].items():
        assert rows.equals(tables[1][name]), name


def test_every_engine_is_checked(ward, database):
    found = check_source(open_source(database))
    assert found.ok, str(found)
    expected = check_source(ward)
    counts = [each.counts.set_index("what")["here"].to_dict() for each in (found, expected)]
    assert counts[0] == counts[1]
    columns = ["step", "stays", "admissions", "subjects"]
    assert found.attrition[columns].equals(expected.attrition[columns])


def test_nothing_is_written_into_the_database(ward, database, cache, request):
    if not str(database).startswith("postgres"):
        pytest.skip("asked of the engine whose rights can be taken away")
    port = request.getfixturevalue("postgres_server")
    with connect_postgres(port, "ward") as server:
        server.execute("CREATE ROLE reader LOGIN PASSWORD 'only-reads'")
        server.execute("REVOKE ALL ON SCHEMA public FROM PUBLIC")
        server.execute("REVOKE TEMPORARY ON DATABASE ward FROM PUBLIC")
        for room in ("hosp", "icu", "note"):
            server.execute(f"GRANT USAGE ON SCHEMA mimiciv_{room} TO reader")
            server.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA mimiciv_{room} TO reader")
    reader = address(port, "ward", "reader", "only-reads")
    task = task_of(open_source(reader), SAFE, cache / "reader")
    assert_same(task, mortality_task(ward, SAFE))


def test_the_time_zone_of_a_session_is_left_alone(spark_session):
    with contextlib.suppress(InputError):
        open_source(spark_session)
    assert spark_session.conf.get("spark.sql.session.timeZone") == "-05:00"


@pytest.mark.parametrize("engine", ["duckdb", "postgres"])
def test_the_demo_is_the_same_in_every_engine(mimic_demo, tmp_path, request, engine):
    source = open_source(mimic_demo)
    if engine == "duckdb":
        held = load_duckdb(source, tmp_path / "demo.duckdb")
    else:
        held = load_postgres(source, request.getfixturevalue("postgres_server"), "demo")
    for protocol in (SAFE, PUBLISHED):
        assert_same(
            task_of(open_source(held), protocol, tmp_path), mortality_task(source, protocol)
        )


NAMES = {
    "mimic-code": lambda room, table: (f"mimiciv_{room}", table),
    "version 1.0": lambda room, table: (
        "mimic_core" if table in ("patients", "admissions") else f"mimic_{room}",
        table,
    ),
    "capital letters": lambda room, table: (f"MIMICIV_{room.upper()}", table.upper()),
    "side by side": lambda room, table: ("main", table),
}


@pytest.mark.parametrize("names", NAMES)
def test_tables_are_found_by_the_names_people_have(ward, tmp_path, names):
    source = open_source(load_duckdb(ward, tmp_path / "ward.duckdb", NAMES[names]))
    assert set(source.relations) == set(ward.files)
    extract = extract_source(source, tmp_path / "cache", ITEMS, quiet=True)
    assert (
        mortality_task(extract, SAFE).series.tobytes()
        == mortality_task(ward, SAFE).series.tobytes()
    )


@pytest.mark.parametrize("name", EXTRACTED)
def test_bigquery_is_asked_for_declared_columns_only(name):
    kinds = {"BIGINT": "int64", "DOUBLE": "float64", "VARCHAR": "string", "TIMESTAMP": "timestamp"}
    unbound = {}
    for table, columns in (TABLES | EXTRA_TABLES).items():
        types = {column: kinds[kind] for column, kind in columns.items()} | {"secret": "string"}
        room, short = table.split("/")
        unbound[table] = ibis.table(
            types, short, database=f"mimiciv_3_1_{room}", catalog="hospital"
        )
    rows = travelling_rows(unbound, name, ITEMS)
    sql = str(ibis.to_sql(rows, dialect="bigquery"))
    assert "secret" not in sql
    assert not any(word in sql.upper() for word in ("CREATE", "TEMP", "INSERT", "UNNEST"))
    assert list(rows.columns) == list((TABLES | EXTRA_TABLES)[name])
    assert (str(ITEMS[0]) in sql) == (name in EVENT_TABLES)
    is_for_patients = name in EVENT_TABLES or name.startswith("note/")
    assert ("mimiciv_3_1_icu`.`icustays" in sql) == (is_for_patients or name == "icu/icustays")


def refusal(action):
    """The one line with which something is refused, without the password."""
    with pytest.raises(InputError) as caught:
        action()
    line = str(caught.value)
    assert "\n" not in line and PASSWORD not in line and "s3cr" not in line
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return line


def test_a_server_that_is_down_is_named():
    line = refusal(lambda: open_source(address(1, "ward")))
    assert line.startswith("postgres://owner@127.0.0.1:1/ward: the database does not answer")


def test_a_wrong_password_and_a_wrong_database_are_named(postgres_server):
    wrong = address(postgres_server, "postgres", password="s3cret-guess")
    line = refusal(lambda: open_source(wrong))
    assert line.endswith("the user or the password is wrong")
    line = refusal(lambda: open_source(address(postgres_server, "nowhere")))
    assert "there is no database nowhere" in line
    line = refusal(lambda: open_source(address(postgres_server, "postgres")))
    assert "no tables of MIMIC-IV" in line


def test_a_missing_grant_is_named(ward, postgres_server, tmp_path):
    load_postgres(ward, postgres_server, "closed")
    with connect_postgres(postgres_server, "closed") as server:
        server.execute("CREATE ROLE guest LOGIN PASSWORD 's3cr@t/word'")
    guest = address(postgres_server, "closed", "guest")
    line = refusal(lambda: open_source(guest))
    assert "may not read" in line and "GRANT USAGE" in line
    with connect_postgres(postgres_server, "closed") as server:
        for room in ("hosp", "icu", "note"):
            server.execute(f"GRANT USAGE ON SCHEMA mimiciv_{room} TO guest")
        server.execute("GRANT SELECT ON ALL TABLES IN SCHEMA mimiciv_hosp, mimiciv_note TO guest")
        server.execute("GRANT SELECT ON mimiciv_icu.icustays TO guest")
    line = refusal(lambda: extract_source(open_source(guest), tmp_path, ITEMS, quiet=True))
    assert "may not read chartevents; ask for GRANT" in line
    assert not list(tmp_path.glob("*/extract.json")) and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    "name, change, said",
    [
        (
            "mimiciv_icu.chartevents",
            "DROP COLUMN valuenum",
            "chartevents: column valuenum is missing",
        ),
        ("mimiciv_hosp.patients", "DROP COLUMN anchor_year_group", "column anchor_year_group is"),
        ("mimiciv_hosp.labevents", "RENAME TO labs", "table hosp/labevents is missing"),
        ("mimiciv_icu.icustays", "RENAME TO stays", "no tables of MIMIC-IV"),
    ],
)
def test_what_a_database_lacks_is_named(ward, tmp_path, name, change, said):
    held = load_duckdb(ward, tmp_path / "ward.duckdb")
    with duckdb.connect(held.removeprefix("duckdb://")) as database:
        database.execute(f"ALTER TABLE {name} {change}")
    line = refusal(lambda: extract_source(open_source(held), tmp_path / "cache", ITEMS, quiet=True))
    assert said in line and line.startswith(held)


def test_a_value_that_is_no_number_and_a_twin_are_named(ward, tmp_path):
    held = load_duckdb(ward, tmp_path / "ward.duckdb")
    with duckdb.connect(held.removeprefix("duckdb://")) as database:
        database.execute("ALTER TABLE mimiciv_icu.icustays ALTER los TYPE VARCHAR")
        database.execute("UPDATE mimiciv_icu.icustays SET los = 'long'")
    line = refusal(lambda: extract_source(open_source(held), tmp_path / "cache", ITEMS, quiet=True))
    assert "'long'" in line
    with duckdb.connect(held.removeprefix("duckdb://")) as database:
        database.execute("UPDATE mimiciv_icu.icustays SET los = '2.5'")
        database.execute("INSERT INTO mimiciv_icu.icustays FROM mimiciv_icu.icustays LIMIT 1")
    line = refusal(lambda: extract_source(open_source(held), tmp_path / "cache", ITEMS, quiet=True))
    assert "icu/icustays, column stay_id" in line and "stands twice" in line


def test_missing_extras_are_named(monkeypatch):
    import sys

    for module, where, extra in (
        ("psycopg", "postgres://owner@127.0.0.1/ward", "postgres"),
        ("google.cloud.bigquery", "bigquery://hospital/mimiciv_3_1", "bigquery"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        assert f"clinfuse[{extra}]" in refusal(lambda where=where: open_source(where))

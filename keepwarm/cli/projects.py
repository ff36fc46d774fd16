"""keepwarm projects: make, list and archive an organisation's projects."""

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from keepwarm.cli.options import AsJson, DatabaseUrl, DataDir
from keepwarm.cli.orgs import print_json, with_identities
from keepwarm.cli.show import shown_time
from keepwarm.core.identity import DEFAULT_ORGANISATION

CREATE_EXAMPLE = "keepwarm projects create search --org research"
LIST_EXAMPLE = "keepwarm projects list --org research"
ARCHIVE_EXAMPLE = "keepwarm projects archive search --org research"

ProjectName = Annotated[str, typer.Argument(metavar="PROJECT", help="What the project is called.")]
Org = Annotated[str, typer.Option("--org", metavar="ORG", help="Its organisation.")]


def create(
    project: ProjectName, org: Org = DEFAULT_ORGANISATION, data_dir: DataDir = None, database_url: DatabaseUrl = None
) -> None:
    """Make a project, or take an archived one into use again."""
    with_identities(data_dir, database_url, lambda found: found.create_project(org, project))
    typer.echo(f"made {org}/{project}")


def list_projects(
    org: Org = DEFAULT_ORGANISATION, as_json: AsJson = False, data_dir: DataDir = None, database_url: DatabaseUrl = None
) -> None:
    """List an organisation's projects, archived ones too."""
    found = with_identities(data_dir, database_url, lambda identities: identities.projects(org))
    if as_json:
        print_json(found)
        return
    table = Table("project", "created", "archived")
    for project in found:
        archived = "" if project.archived_at is None else shown_time(project.archived_at)
        table.add_row(escape(project.name), shown_time(project.created_at), archived)
    Console().print(table)


def archive(
    project: ProjectName, org: Org = DEFAULT_ORGANISATION, data_dir: DataDir = None, database_url: DatabaseUrl = None
) -> None:
    """Refuse a project's keys, also in a running server, until it is made again."""
    with_identities(data_dir, database_url, lambda found: found.archive_project(org, project, by=None))
    typer.echo(f"archived {org}/{project}")

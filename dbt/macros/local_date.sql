{#- A timestamp in the time zone of the fraud rules. On the first and the last day of the calendar, which may have no neighbour
    there, it is as in UTC. -#}
{%- macro local_date(timestamp_column) -%}
    {{ _local(timestamp_column, "date(" ~ timestamp_column ~ ", '" ~ var("time_zone") ~ "')", "date(" ~ timestamp_column ~ ")") }}
{%- endmacro -%}

{#- `part`: as in extract. -#}
{%- macro local_part(part, timestamp_column) -%}
    {%- set of_utc = "extract(" ~ part ~ " from " ~ timestamp_column -%}
    {{ _local(timestamp_column, of_utc ~ " at time zone '" ~ var("time_zone") ~ "')", of_utc ~ ")") }}
{%- endmacro -%}

{%- macro _local(timestamp_column, there, in_utc) -%}
    if(
            {{ timestamp_column }} between timestamp '0001-01-02' and timestamp '9999-12-30',
            {{ there }},
            {{ in_utc }}
        )
{%- endmacro -%}
